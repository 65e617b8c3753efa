"""How figures become files: one look for all, and the same bytes every time."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lnpu_torch.files import ConfigError, write, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOOK: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.edgecolor": "#8A929E",
    "axes.labelcolor": "#22272E",
    "axes.linewidth": 0.8,
    "text.color": "#22272E",
    "text.parse_math": False,  # a layer may be called $x$
    "xtick.color": "#4A5361",
    "ytick.color": "#4A5361",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


@contextmanager
def look() -> Iterator[None]:
    """Within the block figures are drawn in one look, whatever the user's own settings are.

    Raises:
        ConfigError: matplotlib is missing; it names the extra to install.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ConfigError("figures need matplotlib: pip install 'lnpu-torch[plot]'") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(LOOK)
        yield


def svg(figure: Figure, name: str, text: Literal["none", "path"] = "none") -> str:
    """A figure as SVG. `text` "none" leaves text to the reader's fonts, "path" draws it.

    `name` makes the ids in it unlike those of other figures on the page.
    """
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": text, "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write each figure as PNG and SVG into a folder, which is made. Raises ConfigError."""
    files = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be made: {error.strerror or error}") from None
    for name, figure in figures.items():
        png, as_svg = folder / f"{name}.png", folder / f"{name}.svg"
        write(png, partial(figure.savefig, dpi=200, format="png"))
        write_text(as_svg, svg(figure, name, "path"))
        files += [png, as_svg]
    return files

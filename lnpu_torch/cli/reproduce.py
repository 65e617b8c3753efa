"""The command that holds claims against runs: lnpu reproduce. It reads arguments and writes files."""

from __future__ import annotations

import json
import platform
import time
from datetime import date
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lnpu_torch.cli.train import keys, with_settings
from lnpu_torch.files import ConfigError, find, parse_yaml, read_text, user_path, validate, write_text
from lnpu_torch.reporting import figure_style
from lnpu_torch.versions import versions

if TYPE_CHECKING:
    import torch

    from lnpu_torch.recipes.measurements import Evidence

_path = partial(typer.Option, parser=user_path, metavar="PATH")
Changes = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as counted=8 data.crop=4.")
]
Full = Annotated[bool, typer.Option("--full", help="Torchvision's networks at 224 x 224 pixels; wants a GPU.")]
Trained = Annotated[
    bool, typer.Option("--trained", help="Networks that come trained on CIFAR-10, and its images; see --data.")
]
Images = Annotated[
    Path | None, _path("--data", help="An .npz file or a folder, as `lnpu train` reads them; else the settings' own.")
]
Json = Annotated[Path | None, _path("--json", help="Write rows, layers and curves as JSON.")]
Markdown = Annotated[Path | None, _path(help="Write a page, and its plots into images/ beside it.")]


def reproduce(
    settings: Changes = None,
    full: Full = False,
    trained: Trained = False,
    data: Images = None,
    json_file: Json = None,
    markdown: Markdown = None,
) -> None:
    """Run what the papers' claims are about; print each claim beside our own figure, and why they differ."""
    from lnpu_torch.recipes import reproduce as recipe
    from lnpu_torch.recipes import reproduction_text
    from lnpu_torch.recipes.short_training import Settings, pick_device

    if full and trained:
        raise ConfigError("--full and --trained are two settings; give one of them")
    name = "full" if full else "trained" if trained else "small"
    path, started = find("reproduction", name, "settings"), _clocks()
    start = parse_yaml(read_text(path), str(path)) | ({"data": images_in(data)} if data else {})
    given = with_settings(start, settings or [], Settings)
    chosen = validate(Settings, given, str(path), keys(settings or []))
    _can_write(json_file, markdown)
    rows, evidence = recipe.reproduce(chosen, lambda words: Console(stderr=True).print(words, style="dim"))
    spent = {name: now - started[name] for name, now in _clocks().items()}
    machine = device(pick_device(chosen.device))
    told = {"date": f"{date.today():%Y-%m-%d}", "device": machine, **spent, "versions": versions()}
    print(reproduction_text.table(rows))
    if json_file:
        write_text(json_file, json.dumps(reproduction_text.as_data(rows, evidence, chosen, told), indent=1) + "\n")
    if markdown:
        images = save_plots(evidence, markdown.parent / "images")
        write_text(markdown, reproduction_text.markdown(rows, evidence, chosen, told, images))


def _clocks() -> dict[str, float]:
    """Seconds that pass, and those that CPUs have worked for us, which does not hang on what else runs there."""
    return {"seconds": time.monotonic(), "cpu_seconds": time.process_time()}


def images_in(path: Path) -> dict[str, str]:
    """Settings of the data in a file, or in a folder of photographs."""
    return {"kind": "imagefolder" if path.is_dir() else "npz", "path": str(path)}


def _can_write(json_file: Path | None, page: Path | None) -> None:
    """Raises ConfigError now for what would fail after the run."""
    for file in filter(None, (json_file, page)):
        if not file.parent.is_dir():
            raise ConfigError(f"{file}: cannot be written: {file.parent} is no folder")
    if page:
        with figure_style.look():
            pass


def save_plots(evidence: Evidence, folder: Path) -> dict[str, str]:
    """Draw both plots as SVG into a folder, which is made; returns their paths as seen from beside it, by name."""
    from lnpu_torch.recipes import claims, reproduction_plots

    folder.mkdir(exist_ok=True)
    paths = {}
    with figure_style.look():
        for name, figure in reproduction_plots.figures(evidence, claims.read_claims()).items():
            paths[name] = f"{folder.name}/reproduction_{name}.svg"
            write_text(folder.parent / paths[name], figure_style.svg(figure, name, "path"))
    return paths


def device(chosen: torch.device) -> str:
    """What the networks ran on, in words."""
    import torch

    if chosen.type == "cuda":
        return torch.cuda.get_device_name(chosen)
    threads = torch.get_num_threads()
    kind = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"CPU ({kind}), {threads} thread{'s' if threads > 1 else ''}"

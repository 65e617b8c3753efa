"""The drawings of docs/fgmp.md, from the library itself: what `lnpu.quantize` rounded, and a real layer's tensors.

`python docs/generate/drawings.py` (make drawings) writes docs/images/*.svg. Needs the extras `plot` and `recipes`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lnpu_torch as lnpu
from lnpu_torch.reporting import figure_style

IMAGES = Path(__file__).parent.parent / "images"
FP8, FP16, ZERO, INK = "#0B7A75", "#C2571A", "#9AA3AF", "#22272E"
GROUPS = ((0, ZERO, "zero"), (8, FP8, "FP8"), (16, FP16, "FP16"))
SCALE = 1024  # of the loss, as a GradScaler's: errors stay clear of FP16's smallest numbers
T = 6  # tau = 2^1 (1 + 2/4) = 3


def tau(threshold: int) -> float:
    return 2.0 ** (threshold >> 2) * (1 + (threshold & 3) / 4)


def rounded(x: Tensor, threshold: int) -> tuple[Tensor, Tensor]:
    values, groups = lnpu.quantize(x, "fgmp", threshold=threshold, return_classes=True)
    return values, groups


def _axes(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def number_lines() -> Any:
    """The values that an operand can have around its threshold, and further down, towards zero."""
    figure, axes = _axes(2, 1, (7.2, 2.9))
    spans = ((0, 4.2, "around the threshold: T = 6, so tau = 3"), (0, 2**-5, "the same line, 134 times closer to zero"))
    for axis, (low, high, title) in zip(axes, spans, strict=True):
        values, groups = rounded(torch.linspace(low, high, 400_001), T)
        for group, colour, name in GROUPS:
            codes = values[groups == group].unique()
            codes = codes[codes <= high]
            height = 1 if group == 8 else 0.45
            label = f"{name}: {len(codes):,} values here" if group and len(codes) else None
            axis.vlines(codes, 0, height, colour, linewidth=1 if group == 8 else 0.6, label=label)
        axis.plot([0], [0], "o", color=INK, markersize=4, clip_on=False)
        axis.set_title(title, loc="left")
        axis.set(yticks=[], ylim=(0, 1.25), xlim=(low - 0.005 * high, high))
        axis.spines[["left", "top", "right"]].set_visible(False)
        axis.legend(frameon=False, ncols=2, loc="upper right", bbox_to_anchor=(1, 1.28))
    axes[0].axvline(tau(T), color=INK, linestyle=":", linewidth=1)
    axes[0].text(tau(T) + 0.03, 1.05, "tau", color=INK)
    return figure


def error_by_magnitude() -> Any:
    """How far rounding moves a value at most, relative to it, by magnitude: FGMP beside each of its formats alone."""
    figure, axis = _axes(1, 1, (7.2, 2.9))
    binades, steps, inside = range(-18, 5), 8, 500
    x = torch.logspace(
        binades[0], binades[-1], steps * inside * (len(binades) - 1), base=2.0, dtype=torch.float64
    ).float()
    values, groups = rounded(x, T)
    at = x.view(-1, inside)[:, 0]

    def worst(values: Tensor) -> Tensor:
        return ((values - x) / x).abs().view(-1, inside).max(1).values

    axis.plot(at, worst(lnpu.quantize(x, "fp16")), color=ZERO, linewidth=3, label="FP16 alone")
    alone = "FP8 alone, of range enough for 64"
    axis.plot(at, worst(lnpu.quantize(x, "fp8", threshold=4 * 5 + 3)), color="#D9B44A", linewidth=3, label=alone)
    for group, colour, name in GROUPS[1:]:
        here = groups.view(-1, inside)[:, 0] == group
        axis.plot(at[here], worst(values)[here], color=colour, linewidth=1.2, label=f"FGMP, {name}")
    axis.axvline(tau(T), color=INK, linestyle=":", linewidth=1)
    axis.text(tau(T) * 1.08, 0.3, "tau = 3", color=INK)
    axis.text(2.0**-17.8, 1.15, "1: rounded to zero", color=INK)
    axis.set(xscale="log", yscale="log", ylim=(1e-4, 2), xlim=(2.0**-18, 16), ylabel="largest |q - x| / |x|")
    axis.set_xticks([2.0**e for e in binades[::2]], [f"$2^{{{e}}}$" for e in binades[::2]])
    axis.set_xlabel("magnitude of x")
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def trained_layer(epochs: int = 3) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small network after a little training on scanned digits, and the three tensors of its second convolution."""
    from sklearn.datasets import load_digits

    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    images = images.float().view(-1, 1, 8, 8) / 16
    torch.manual_seed(0)
    torch.set_num_threads(1)
    first = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()
    second = nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    model = lnpu.convert(nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(512, 10)), "fgmp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    seen: dict[str, Tensor] = {}
    model[2].register_forward_hook(lambda layer, inputs, output: _keep(seen, layer, inputs[0], output))
    for _ in range(epochs):
        for batch in torch.randperm(1500).split(50):
            optimizer.zero_grad()
            (SCALE * F.cross_entropy(model(images[batch]), labels[batch])).backward()
            for parameter in model.parameters():
                parameter.grad /= SCALE
            optimizer.step()
    return model, seen


def _keep(seen: dict[str, Tensor], layer: nn.Module, input: Tensor, output: Tensor) -> None:
    seen |= {"input": input.detach(), "weight": layer.weight.detach().clone()}
    output.register_hook(lambda grad: seen.update(grad_output=grad.detach()))


def chosen_threshold(x: Tensor) -> int:
    """The T that the default rule picks for a tensor."""
    from lnpu_torch.ops.quantize.reference import choose_threshold
    from lnpu_torch.quant.precision import PRESETS

    return int(choose_threshold(x, PRESETS["fgmp"], torch.zeros((), dtype=torch.int32)))


def histograms(tensors: dict[str, Tensor]) -> Any:
    """How many elements of each magnitude a real layer's operands have, and which group they fall into."""
    import numpy as np

    figure, axes = _axes(1, 3, (7.2, 2.6))
    for axis, (name, x) in zip(axes, tensors.items(), strict=True):
        t = chosen_threshold(x)
        groups, exponent = rounded(x, t)[1].flatten(), x.abs().flatten().log2()
        inside = exponent.isfinite()
        top = float(exponent[inside].max().ceil())
        parts = [exponent[inside & (groups == group)].numpy() for group, _, _ in GROUPS]
        axis.hist(parts, np.arange(top - 24, top + 0.25, 0.5), stacked=True, color=[colour for _, colour, _ in GROUPS])
        axis.axvline(np.log2(tau(t)), color=INK, linestyle=":", linewidth=1)
        exact = float((x == 0).float().mean())
        zero, fp8, fp16 = (float((groups == group).float().mean()) for group, _, _ in GROUPS)
        axis.set_title(f"{name}, T = {t}\n", loc="left")
        small = {"transform": axis.transAxes, "fontsize": 6.5}
        axis.text(0, 1.02, f"zero {exact:.1%} + {zero - exact:.1%}", color="#6B7480", **small)
        axis.text(0.5, 1.02, f"FP8 {fp8:.1%}", color=FP8, **small)
        axis.text(0.75, 1.02, f"FP16 {fp16:.1%}", color=FP16, **small)
        axis.set(xlabel="log2 |x|", yticks=[])
        axis.spines[["left", "top", "right"]].set_visible(False)
    return figure


def skipping() -> Any:
    """The operand that each step of a small linear layer streams, and what its zeros let the step skip."""
    torch.manual_seed(3)
    input = torch.relu(torch.randn(4, 6)).requires_grad_()
    error = torch.randn(4, 5) * (torch.rand(4, 5) > 0.4)
    layer = lnpu.nn.Linear(6, 5, bias=False)
    with lnpu.CostCounter(layer, vector_ops=False) as cost:
        layer(input).backward(error)
    rows = {row.step: row for row in cost.report("lnpu").rows}
    panels = (
        ("forward", "input", input, "5 weights, those of its feature"),
        ("grad_input", "grad_output", error, "6 weights, those of its output"),
        ("grad_weight", "input", input, "5 errors, those of its sample"),
    )
    figure, axes = _axes(1, 3, (7.2, 2.6))
    for axis, (step, name, streamed, meets) in zip(axes, panels, strict=True):
        groups = lnpu.quantize(streamed.detach(), "fgmp", return_classes=True)[1]
        _squares(axis, groups)
        row = rows[step]
        told = f"each {name} meets\n{meets}\n{row.executed} of {row.macs} MACs executed,\n{row.skipped} skipped"
        axis.set_title(f"{step}: {name} {list(groups.shape)}", loc="left")
        axis.text(0, -0.05, told, transform=axis.transAxes, va="top")
    return figure


def _squares(axis: Any, groups: Tensor) -> None:
    """A matrix of groups, a square each; zeros are hollow."""
    from matplotlib.patches import Rectangle

    colours = {group: colour for group, colour, _ in GROUPS}
    for (row, column), group in zip(
        torch.cartesian_prod(*map(torch.arange, groups.shape)).tolist(), groups.flatten().tolist(), strict=True
    ):
        face = colours[group] if group else "white"
        axis.add_patch(Rectangle((column + 0.06, row + 0.06), 0.88, 0.88, facecolor=face, edgecolor=colours[group]))
    axis.set(xlim=(-0.05, 6.05), ylim=(4.05, -0.05), aspect="equal", anchor="W")
    axis.axis("off")


def figures() -> dict[str, Callable[[], Any]]:
    return {
        "number_lines": number_lines,
        "error_by_magnitude": error_by_magnitude,
        "histograms": lambda: histograms(trained_layer()[1]),
        "skipping": skipping,
    }


def main(folder: Path = IMAGES) -> None:
    for name, draw in figures().items():
        with figure_style.look():
            (folder / f"{name}.svg").write_text(figure_style.svg(draw(), name, "path"), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

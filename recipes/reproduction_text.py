"""How the rows of `lnpu reproduce` are shown: table, JSON, Markdown. It knows no runs beyond what it is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.text import Text

import lnpu_torch as lnpu
from lnpu_torch.recipes.measurements import STEPS, Evidence, access, each, energy, layers, zero_shares
from lnpu_torch.recipes.reproduce import Row
from lnpu_torch.recipes.short_training import Probe, Settings
from lnpu_torch.text_tables import add_row, markdown_table, plain, plain_table

BASIS = {
    "held out": "nothing of the claim went into our figure",
    "circular": "the model was calibrated on it, so that agreement says nothing",
    "assumed": "rests on a choice of ours that no run can prove",
    "not modelled": "there is nothing behind it",
}


def table(rows: Sequence[Row]) -> str:
    """The claims, and below them why each of our figures is what it is."""
    shown = plain_table("Claims of the papers and our runs", ["claim", "published", "ours", "difference", "basis"], [])
    for row in rows:
        add_row(shown, f"{row.what}{recalled(row)}", row.published, row.ours_text, row.difference, row.basis)
    legend = [Text(f"{basis}: {words}") for basis, words in BASIS.items()]
    return plain(shown, Text(), *legend, *(Text(f"\n{row.what}: {row.why}") for row in rows))


def recalled(row: Row) -> str:
    """What a reader must know of a figure that no source states."""
    return {"published": "", "derived": " (derived)", "assumed": " (recalled)"}[row.tag]


def as_data(rows: Sequence[Row], evidence: Evidence, settings: Settings, told: Mapping[str, Any]) -> dict[str, Any]:
    """Plain data: the rows, zeros by layer and step, the curves, the settings, and what `told` says of the run."""
    return {
        **told,
        "settings": settings.model_dump(mode="json"),
        "rows": [asdict(row) for row in rows],
        "images": evidence.images,
        "trained": {
            name: {"fgmp": asdict(probe.trained), "float32": asdict(probe.in_float32)}
            for name, probe in evidence.probes.items()
        },
        "layers": [
            {"network": name, **asdict(each)}
            for name, probe in evidence.probes.items()
            for each in layers(probe.fgmp).rows
        ],
        "curves": {name: [asdict(point) for point in curve] for name, curve in evidence.curves.items()},
    }


def markdown(
    rows: Sequence[Row], evidence: Evidence, settings: Settings, told: Mapping[str, Any], images: Mapping[str, str]
) -> str:
    """The page: every claim as one row, both plots, zeros by layer and step. `images`: paths of the plots by name."""
    return "\n\n".join(
        [
            "# The papers' claims beside our runs",
            "Written by `lnpu reproduce --markdown`. All figures of ours, those under *why* too, are this run's.",
            run_lines(evidence, settings, told),
            claims_table(rows),
            "\n".join(f"- **{basis}**: {words}." for basis, words in BASIS.items()),
            "## Zeros by layer and step",
            f"![Zeros by layer and step]({images['zeros']})",
            "Zeros among the elements that each step streams (FF and WG: inputs, EP: errors), and FP8 among the "
            "others, over "
            "the counted steps; no EP where nobody asks for it.",
            *(layer_table(name, layers(probe.fgmp)) for name, probe in evidence.probes.items()),
            "## Zeros that rounding makes",
            "The thesis has zeros come from FGMP and ReLU. ResNet-18's counted steps, once more with every operand by "
            "these rules (`window`: how many binades of FP8's window are kept, counted from its top; E4M3 has 18, the "
            "lowest three of them subnormals); loss of these steps and accuracy after them.",
            readings_table(rows, evidence.probes["resnet18"]),
            "## Efficiency against zeros",
            f"![Efficiency against zeros]({images['efficiency']})",
            "One 3x3 convolution, its three steps, inputs and errors with so many zeros spread at random; TFLOPS/W of "
            "MACs "
            "alone, and in parentheses with filling the SRAM.",
            curve_table(evidence),
        ]
    ) + ("\n")


def run_lines(evidence: Evidence, settings: Settings, told: Mapping[str, Any]) -> str:
    """When, where, on what data and with which settings."""
    pixels = f"{settings.size} x {settings.size} pixels"
    names = ", ".join(
        f"{each.model.name} ({f'width {each.model.width}, ' if each.model.width else ''}"
        f"{f'from {each.weights}, ' if each.weights else ''}{each.steps} steps of AdamW at {each.lr:g})"
        for each in settings.networks.values()
    )
    lines = {
        "date": told["date"],
        "device": told["device"],
        "time": f"{told['seconds'] / 60:.1f} min, {told['cpu_seconds'] / 60:.1f} min of CPU",
        "versions": ", ".join(f"{name} {version}" for name, version in told["versions"].items()),
        "images": f"{evidence.images}; {pixels}, batches of {settings.batch_size}",
        "networks": f"{names}; the last {settings.counted} steps are counted; seed {settings.seed}",
        "accuracy at which zeros are counted": each(
            {name: f"{probe.trained.accuracy:.1%}" for name, probe in evidence.probes.items()}
        ),
    }
    return "\n".join(f"- {name}: {text}" for name, text in lines.items())


def claims_table(rows: Sequence[Row]) -> str:
    body = (
        (
            f"{row.what}{recalled(row)}",
            row.published,
            row.ours_text,
            row.difference,
            f"*{row.basis}.* {row.why}",
            row.source,
        )
        for row in rows
    )
    return markdown_table(["claim", "published", "ours", "difference", "why", "source"], body)


def layer_table(network: str, report: lnpu.Report) -> str:
    """Zeros and FP8 of each layer's steps, "45.1 %, 78.0 %"."""
    cells: dict[str, dict[str, str]] = {}
    for row in report.rows:
        zero, fp8 = ("-" if share is None else f"{share:.1%}" for share in (row.zero_share, row.fp8_share))
        cells.setdefault(row.layer, {})[row.step] = f"{zero}, {fp8}"
    heads = [f"{short}: zeros, FP8" for short in STEPS.values()]
    return markdown_table(
        [network, *heads], ((layer, *(steps.get(step, "-") for step in STEPS)) for layer, steps in cells.items())
    )


def readings_table(rows: Sequence[Row], probe: Probe) -> str:
    """What each rule makes of the same steps: zeros by step, and what the published figures are about."""
    published = {row.key: row.published for row in rows}
    claims = (published[key] for key in ("memory_access", "resnet18_efficiency", "fgmp_over_sparse_fp16"))
    heads = ["", *(f"zeros, {short}" for short in STEPS.values()), "external access", "over dense FP16"]
    body = [("published", *"-" * len(STEPS), *claims, "-", "-")]
    for name, (counts, trained) in {"FGMP": (probe.fgmp, probe.trained), **probe.readings}.items():
        report = layers(counts)
        zeros = (f"{zero_shares(report)[step]:.1%}" for step in STEPS)
        dense, sparse = (energy(probe.fp16, chip) / energy(counts) for chip in ("dense-fp16", "lnpu-fp16"))
        traffic, learned = f"{100 * access(report.total):+.1f} %", (f"{trained.loss:.3f}", f"{trained.accuracy:.1%}")
        body.append((name, *zeros, traffic, f"{dense:.2f}x", f"{sparse:.2f}x", *learned))
    return markdown_table([*heads, "over sparse FP16", "loss", "accuracy"], body)


def curve_table(evidence: Evidence) -> str:
    points = zip(*evidence.curves.values(), strict=True)
    body = ((f"{row[0].zeros:.0%}", *(f"{point.macs:.2f} ({point.chip:.2f})" for point in row)) for row in points)
    return markdown_table(["zeros", *evidence.curves], body)

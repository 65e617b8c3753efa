"""Files that the settings of a small run name."""

from __future__ import annotations

from pathlib import Path

FGMP = "input: fgmp\nweight: fgmp\ngrad_output: fgmp\n"
FP8 = "input: fp8\nweight: fp8\ngrad_output: fp8\n"
CHIP = "like: lnpu\nname: mine\ndescription: mine\nmacs_per_cycle: {fp16: {value: 96, tag: assumed, source: test}}\n"
FILES = {
    "precision": ("p.yaml", FGMP, FP8, "precision.input.high: fp16 -> None"),
    "overrides": ("o.yaml", FP8, FP8 + "result: fp32\n", "overrides.fc.result: fp16 -> fp32"),
    "chip": ("c.yaml", CHIP, CHIP.replace("96", "97"), "chip.2.macs_per_cycle.fp16.value: 96 -> 97"),
}
NAMED = ("precision=p.yaml", "overrides.fc=o.yaml", "chip=[lnpu, c.yaml]")
SMALL = ("epochs=2", "limit=2", "batch_size=32", "model.width=2", "data.size=8")


def write_files(folder: Path) -> None:
    for name, content, _, _ in FILES.values():
        (folder / name).write_text(content)

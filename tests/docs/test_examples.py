"""The scripts in examples/ that need only scikit-learn, in small; and what docs/ says that they print."""

from __future__ import annotations

import re
import runpy
from typing import Any

import pytest

from helpers.paths import ROOT

pytest.importorskip("sklearn")

PRINTED = ROOT / "docs" / "printed"


def run(name: str, capsys: pytest.CaptureFixture[str], **small: Any) -> str:
    runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"](**small)
    return capsys.readouterr().out


def lines(text: str) -> list[str]:
    """Lines with all numbers taken out: what is left must not depend on how much was run."""
    return [" ".join(re.sub(r"[-+]?\d[\d.]* ?[kMGunm]?(J|bit|s\b)?", "#", line).split()) for line in text.splitlines()]


def test_layers_are_swapped(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("swap_layers", capsys, epochs=1)
    documented = (PRINTED / "swap_layers.txt").read_text()
    accuracy = [float(each) for each in re.findall(r"test accuracy ([\d.]+)%", printed)]
    assert len(accuracy) == 2 and min(accuracy) > 60
    shown = [line for line in lines(printed) if line.startswith(("conv", "head", "norm", "total #", "in float"))]
    assert len(shown) >= 8 and set(shown) <= set(lines(documented))


def test_shares_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("fp16_share", capsys, shares=[0, 1], seeds=(0, 1), epochs=1)
    rows = re.findall(r"^(share|error) <= ([\d.]+)\s+([\d.]+)%\s+([\d.]+)%\s+([\d.]+) .*?([\d.]+) mJ$", printed, re.M)
    assert [row[:2] for row in rows] == [("share", "0.00"), ("share", "1.00"), ("error", "0.013")]
    (fp8, fp16, _) = [[float(cell) for cell in row[2:]] for row in rows]
    assert fp8[0] == 0 and fp16[0] == 100
    assert fp16[1] < fp8[1], "FP16's gradient is the more exact one"
    assert fp16[3] > 1.5 * fp8[3], "and dearer"
    assert lines(printed)[-1].split(":")[0] == lines((PRINTED / "fp16_share.txt").read_text())[-1].split(":")[0]


def test_chips_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run("compare_chips", capsys, images=100)
    energy = {line[:17].strip(): float(line[17:26]) for line in printed.splitlines()[2:7]}
    ordered = ["lnpu", "lnpu-fp16", "sparse-inference", "dense-fp16"]
    assert sorted(ordered, key=lambda name: energy[name]) == ordered
    assert energy["4 x the lanes"] == energy["lnpu"]
    documented = lines((PRINTED / "compare_chips.txt").read_text())
    assert [line.split(" #")[0] for line in lines(printed)] == [line.split(" #")[0] for line in documented]
    rows = [line.split()[-7:-2] for line in (PRINTED / "compare_chips.txt").read_text().splitlines()[2:7]]
    times = [float(dram) / sum(map(float, chip)) for *chip, dram in rows]
    assert (round(min(times)), round(max(times))) == (4, 7)  # as the page says


def test_replays_of_a_graph_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine without a GPU the same steps, run one by one."""
    counts = runpy.run_path(str(ROOT / "examples" / "cuda_graph.py"))["main"](steps=3, batch=8)
    assert {(step.layer, step.step): step.calls for step in counts.steps} == {
        (layer, step): 3 for layer in ("0", "4") for step in ("forward", "grad_input", "grad_weight")
    }
    assert "energy" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fgmp", "float32"])
def test_a_training_run_in_one_file(precision: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--synthetic", "32", "--epochs", "2", "--batch-size", "16", "--precision", precision]
    printed = run("train_cifar10", capsys, arguments=arguments)
    losses = [float(each) for each in re.findall(r"^epoch +\d +loss ([\d.]+)  test accuracy [\d.]+%", printed, re.M)]
    energies = [float(each) for each in re.findall(r"%  ([\d.]+) J$", printed, re.M)]
    assert len(losses) == 2 and len(energies) == (0 if precision == "float32" else 2)
    assert ("conv1" in printed) == (precision != "float32")
    assert len((ROOT / "examples" / "train_cifar10.py").read_text().splitlines()) < 150

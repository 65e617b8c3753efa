"""docs/extending.md as it stands: each format, layer, chip and recipe on that page is added, and used."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lnpu_torch as lnpu
from helpers.command import lnpu_command
from helpers.handmade import network
from helpers.paths import ROOT

BLOCKS = dict(re.findall(r'```\w+ title="(.*?)"\n(.*?)```', (ROOT / "docs" / "extending.md").read_text(), re.DOTALL))


# Every rounding of the new formats is the reference's, and of bf16 torch's own.
ALIKE = """
from lnpu_torch.ops.quantize import reference
x = torch.randn(4096) * torch.randn(4096).mul(4).exp2()
for keys in ({"low": "e3m4"}, {"low": "e3m4", "high": None}, {"high": "bf16"}):
    rule = lnpu.Rule(threshold=5, **keys)
    assert torch.equal(lnpu.quantize(x, rule), reference.quantize(x, rule, torch.tensor(5, dtype=torch.int32))[0]), rule
large = x[x.abs() >= 2.5]
assert torch.equal(lnpu.quantize(large, rule), large.bfloat16().float())
"""


def test_formats_are_a_line_each(tmp_path: Path) -> None:
    for folder in ("lnpu_torch", "kernels", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    table, end = tmp_path / "lnpu_torch" / "quant" / "formats.py", "    )\n}\n"
    assert table.read_text().count(end) == 1
    table.write_text(table.read_text().replace(end, BLOCKS["lnpu_torch/quant/formats.py"] + end))
    command = [sys.executable, "-W", "error", "-c", BLOCKS["use_formats.py"] + ALIKE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    e4m3, e3m4, bf16 = done.stdout.splitlines()
    assert e3m4.startswith("e3m4 below fp16") and bf16.startswith("e4m3 below bf16")
    share = [float(line.split()[-2].rstrip("%")) for line in (e4m3, e3m4, bf16)]
    assert share[1] < share[0] / 2, "with one more bit of mantissa less FP16 will do"
    assert share[0] == share[2]


def test_a_layer_of_ones_own_is_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    page: dict[str, Any] = {}
    try:
        exec(compile(BLOCKS["use_layer.py"], "use_layer.py", "exec"), page)
    finally:
        lnpu.nn.EMULATED_CLASSES.pop(page["UnitConv2d"])
    printed = capsys.readouterr().out
    assert "2 of 2 layers emulated" in printed and "('0', 'grad_weight', 31104)" in printed


def test_a_chip_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("big_sram.yaml").write_text(BLOCKS["big_sram.yaml"])
    network().save("counts.json")
    assert "half of LNPU's" in " ".join(lnpu_command("chips", "big_sram.yaml").stdout.split())
    done = lnpu_command("price", "counts.json", "--chip", "lnpu", "--chip", "big_sram.yaml", "--format", "json")
    assert done.exit_code == 0 and '"chip": "big_sram"' in done.stdout


def test_a_recipe_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    Path("small_vgg.yaml").write_text(BLOCKS["small_vgg.yaml"])
    small = ("epochs=1", "limit=1", "threads=1", "batch_size=4", "model.width=1", "checkpoint.keep=0", "out=run")
    done = lnpu_command("train", "small_vgg.yaml", *small)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "run" / "counts" / "epoch1.json").is_file()

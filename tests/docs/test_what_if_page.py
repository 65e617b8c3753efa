"""The page on what-ifs: its files are estimated, and its code runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lnpu_torch as lnpu
from helpers.command import lnpu_command
from helpers.paths import ROOT

PAGE = (ROOT / "docs" / "what_if.md").read_text()


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_its_files_are_estimated(text: str, tmp_path: Path) -> None:
    (tmp_path / "paper.yaml").write_text(text)
    result = lnpu_command("estimate", str(tmp_path / "paper.yaml"), "--by", "layer")
    assert result.exit_code == 0, result.output
    assert "ESTIMATE" in result.output and "conv1" in result.output


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    layer = {"kind": "Linear", "in_channels": 8, "out_channels": 8}
    lnpu.estimate({"layer1.0": layer, "layer1.1": layer}, 4).save("epoch12.json")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {"lnpu": lnpu})
    assert "ESTIMATE" in capsys.readouterr().out

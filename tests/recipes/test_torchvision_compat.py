"""torchvision imports beside a torch that its compiled part does not fit, and an import that works is left alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lnpu_torch.files import ConfigError
from lnpu_torch.recipes import torchvision_compat

IN_A_FRESH_PROCESS = """
import warnings
warnings.simplefilter("error")
from lnpu_torch.recipes.torchvision_compat import import_torchvision
import torch
torchvision = import_torchvision()
assert import_torchvision() is torchvision
from torchvision.transforms import v2
from torchvision import datasets
assert torchvision.models.alexnet().features(torch.zeros(1, 3, 64, 64)).shape == (1, 256, 1, 1)
assert v2.RandomCrop(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)
boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]])
try:
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.5)
    assert kept.tolist() == [0]
except RuntimeError as error:
    assert "Couldn't load custom C++ ops" in str(error)
"""


def test_models_datasets_and_transforms_work_here() -> None:
    done = subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_compiled_part_that_loads_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_C.so").touch()
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    assert torchvision_compat.compiled_part_loads(tmp_path)


def test_a_compiled_part_that_is_missing_or_broken_is_noticed(tmp_path: Path) -> None:
    assert not torchvision_compat.compiled_part_loads(tmp_path)
    (tmp_path / "_C.cpython-311.so").write_bytes(b"not a library")
    assert not torchvision_compat.compiled_part_loads(tmp_path)


def test_operators_are_declared_only_if_the_compiled_part_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    declared: list[bool] = []
    monkeypatch.setattr(torchvision_compat, "_declared", [])
    monkeypatch.setattr(torchvision_compat, "declare_operators", lambda: declared.append(True))
    monkeypatch.setattr(torchvision_compat, "compiled_part_loads", lambda folder: True)
    monkeypatch.setattr(torchvision_compat.importlib, "import_module", lambda name: name)
    torchvision_compat.import_torchvision()
    assert not declared
    monkeypatch.setattr(torchvision_compat, "compiled_part_loads", lambda folder: False)
    torchvision_compat.import_torchvision()
    assert declared


def test_operators_that_exist_are_not_declared_again() -> None:
    torchvision_compat.import_torchvision()
    torchvision_compat.declare_operators()  # defining an operator twice raises RuntimeError


def test_a_missing_torchvision_is_said_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision_compat.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"torchvision is not installed: pip install 'lnpu-torch\[recipes\]'"):
        torchvision_compat.import_torchvision()

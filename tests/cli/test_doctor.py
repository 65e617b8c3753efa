"""lnpu doctor, `lnpu` alone, and python -m: what a first hour starts with."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lnpu_torch as lnpu
from helpers.command import lnpu_command
from lnpu_torch.cli.doctor import EXTRAS


def test_it_says_what_would_compute_here() -> None:
    found = json.loads(lnpu_command("doctor", "--json").stdout)
    assert found["versions"] == lnpu.versions()
    assert found["CPU"]["backend"] == "Numba's loops" and str(torch.get_num_threads()) in found["CPU"]["threads"]
    assert found["extras"].keys() == EXTRAS.keys() and found["GPU"]
    table = " ".join(lnpu_command("doctor").stdout.split())
    assert all(name in table for name in ("torch", "threads", "cache of compiled loops", *EXTRAS))


def test_it_says_what_is_missing_and_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = json.loads(lnpu_command("doctor", "--json").stdout)
    assert "pip install numba" in found["CPU"]["backend"]
    assert "pip install 'lnpu-torch[plot]'" in found["extras"]["matplotlib"]


def test_it_finds_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert "nothing yet" in json.loads(lnpu_command("doctor", "--json").stdout)["cache of compiled loops"]["kept"]
    (tmp_path / "loop.nbc").write_bytes(b"0" * 2**20)
    found = json.loads(lnpu_command("doctor", "--json").stdout)["cache of compiled loops"]
    assert found == {"folder": str(tmp_path), "kept": "1 loops, 1.0 MiB"}
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    folder = json.loads(lnpu_command("doctor", "--json").stdout)["cache of compiled loops"]["folder"]
    assert "cannot be written" in folder and "NUMBA_CACHE_DIR" in folder


def test_alone_it_says_what_to_do_first() -> None:
    said = lnpu_command()
    assert said.exit_code == 0
    assert all(f"lnpu {each}" in said.stdout for each in ("train digits_resnet18", "profile", "chips", "--help"))


def test_it_is_a_module_too() -> None:
    done = subprocess.run([sys.executable, "-m", "lnpu_torch", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"lnpu {lnpu.__version__}\n"

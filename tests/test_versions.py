from __future__ import annotations

import importlib
import subprocess
from pathlib import Path

import pytest
import torch

import lnpu_torch as lnpu

versions = importlib.import_module("lnpu_torch.versions")  # the package has the function under this name


def test_what_computes_is_named() -> None:
    found = lnpu.versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0] and found["python"].startswith("3.")
    assert all(found.values())


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_checkout_has_a_commit_and_shows_that_it_was_changed(tmp_path: Path) -> None:
    assert versions._commit(tmp_path) == ""
    git(tmp_path, "init")
    assert versions._commit(tmp_path) == ""  # nothing was committed yet
    (tmp_path / "file").write_text("1")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert versions._commit(tmp_path) == commit
    (tmp_path / "file").write_text("2")
    assert versions._commit(tmp_path) == commit + "+"


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert versions._commit(tmp_path) == ""
    monkeypatch.setattr(versions, "COMPUTES_WITH", ("no-such-package",))
    assert lnpu.versions().keys() <= {"lnpu-torch", "commit", "python"}

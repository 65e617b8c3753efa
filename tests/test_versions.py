from __future__ import annotations

import importlib
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import lnpu_torch as lnpu

versions = importlib.import_module("lnpu_torch.versions")  # the package has the function under this name


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the module in a package."""
    (tmp_path / "package").mkdir()
    shutil.copy(versions.__file__, tmp_path / "package" / "versions.py")
    return tmp_path


def commit_of(checkout: Path) -> str:
    found: dict[str, str] = runpy.run_path(str(checkout / "package" / "versions.py"))["versions"]()
    return found.get("commit", "")


def test_what_computes_is_named() -> None:
    found = lnpu.versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0] and found["python"].startswith("3.")
    assert all(found.values())


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_checkout_has_a_commit_and_shows_that_it_was_changed(checkout: Path) -> None:
    assert commit_of(checkout) == ""
    git(checkout, "init")
    assert commit_of(checkout) == ""  # nothing was committed yet
    (checkout / "file").write_text("1")
    git(checkout, "add", "file")
    git(checkout, "commit", "-m", "first")
    commit = git(checkout, "rev-parse", "--short=12", "HEAD")
    assert commit_of(checkout) == commit
    (checkout / "file").write_text("2")
    assert commit_of(checkout) == commit + "+"


def test_without_git_there_is_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / ".git").mkdir()
    monkeypatch.setenv("PATH", "")
    assert commit_of(checkout) == ""
    monkeypatch.setattr(versions, "COMPUTES_WITH", ("no-such-package",))
    assert lnpu.versions().keys() <= {"lnpu-torch", "commit", "python"}

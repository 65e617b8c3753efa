"""Compiled code on disk: never older than the sources, never damaged; and what is said when it is made."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.paths import ROOT

ROUND = """
import torch, lnpu_torch.ops.quantize.cpu as c
x = torch.tensor([1.0001])
c.round_half(x)
print(x.item() == 1)
"""
"""Whether 1.0001 becomes binary16's 1.0 by a loop that takes a second to compile."""
BOTH = f"""
{ROUND}
from lnpu_torch.quant.precision import Rule
c.histogram(x, c.CompiledRule(Rule()))
"""
"""The same, and another loop that takes longer."""
SAYS = "lnpu_torch: compiling loops for the CPU"


@pytest.fixture(scope="module")
def compiled_package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A copy of the package in which the loops have been compiled, and what that process said."""
    root = tmp_path_factory.mktemp("compiled")
    for folder in ("lnpu_torch", "configs"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (root / "lnpu_torch" / "__init__.py").write_text("")  # so that only the loops are imported
    result, said = run(root / "lnpu_torch", BOTH)
    assert result == "True"
    return root / "lnpu_torch", said


@pytest.fixture
def package(tmp_path: Path, compiled_package: tuple[Path, str]) -> Path:
    """A copy of that copy."""
    shutil.copytree(compiled_package[0].parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / "lnpu_torch"


def run(package: Path, code: str = ROUND, **environment: str) -> tuple[str, str]:
    """Output and messages of a process that imports this copy."""
    inherited = {name: value for name, value in os.environ.items() if name != "NUMBA_CACHE_DIR"}
    environment = {**inherited, "PYTHONPATH": str(package.parent), **environment}
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=package.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr.strip()


def code_files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.nb*"))
    assert found
    return found


def without_code(package: Path) -> set[Path]:
    """The folders in which compiled code was, now removed."""
    folders = {file.parent for file in code_files(package)}
    for folder in folders:
        shutil.rmtree(folder)
    return folders


def test_code_is_compiled_anew_when_a_module_that_it_uses_has_changed(package: Path) -> None:
    helper = package / "ops" / "parallel.py"
    before = helper.read_text()
    changed = before.replace("count * (share + 1) // shares", "count * share // shares")
    assert changed != before

    helper.write_text(changed)
    assert run(package)[0] == "False"
    helper.write_text(before)
    assert run(package)[0] == "True"


def test_each_imported_module_is_among_the_sources(package: Path) -> None:
    code = """
from lnpu_torch.ops.quantize import cpu_loops
from lnpu_torch.ops.numba_jit import sources
from pathlib import Path

file = Path(cpu_loops.__file__)
before = sources(file)
for other in sorted(file.parents[2].rglob("*.py")):
    text = other.read_text()
    other.write_text(text + "# another\\n")
    if sources(file) != before:
        print(other.stem)
    other.write_text(text)
assert sources(file) == before
"""
    found = run(package, code)[0].split()
    loops = {file.stem for file in package.rglob("*.py") if "from numba" in file.read_text()}
    assert loops | {"lane_configs", "reference"} <= {*found}
    assert not {"report", "chip", "nn"} & {*found}


DAMAGES: list[Callable[[bytes], bytes]] = [
    lambda content: b"",
    lambda content: content[: len(content) // 2],
    lambda content: b"garbage" * 100,
    lambda content: content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:],
]


def test_damaged_files_are_named_and_replaced(package: Path) -> None:
    damaged = code_files(package)
    assert len(damaged) >= len(DAMAGES)
    for file, damage in zip(damaged, itertools.cycle(DAMAGES), strict=False):
        file.write_bytes(damage(file.read_bytes()))

    result, said = run(package, BOTH)
    assert result == "True"
    assert all(f"{file} is damaged" in said for file in damaged)
    assert run(package, BOTH) == ("True", "")


def test_compiling_is_announced_once(compiled_package: tuple[Path, str]) -> None:
    said = compiled_package[1]
    assert said.startswith(SAYS) and len(said.splitlines()) == 1
    assert said.endswith(f"kept in {compiled_package[0]}")


def test_code_is_kept_where_numba_is_told(package: Path) -> None:
    folder = package.parent / "kept"
    result, said = run(package, NUMBA_CACHE_DIR=str(folder))
    assert result == "True"
    assert str(code_files(folder)[0].parent) in said


def test_where_nothing_can_be_written_the_variable_is_named(package: Path) -> None:
    file = package.parent / "file"
    file.touch()
    for folder in without_code(package):
        folder.touch()  # a file where a folder would be
    result, said = run(package, HOME=str(file), XDG_CACHE_HOME=str(file))
    assert result == "True"
    assert said.startswith(SAYS) and "NUMBA_CACHE_DIR" in said


def test_a_full_disk_ends_no_run(package: Path) -> None:
    without_code(package)
    code = f"""
from pathlib import Path
def full(*_): raise OSError(28, "No space left on device")
Path.write_bytes = full
{ROUND}
"""
    result, said = run(package, code)
    assert result == "True"
    assert "No space left on device" in said and "NUMBA_CACHE_DIR" in said
    assert not list(package.rglob("*.tmp"))

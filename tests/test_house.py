"""The house rules that a reader relies on: who imports whom, what an import needs, and where the parts are found."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import lnpu_torch
import lnpu_torch.nn.functional
import lnpu_torch.nn.modules
from helpers.paths import ROOT

PACKAGE = ROOT / "lnpu_torch"

EXTERNAL_TO_KERNELS = {"triton", "torch", *sys.stdlib_module_names}
PUBLIC_MODULES = ("files", "named_files", "text_tables", "hardware.chip", "quant.precision")
PUBLIC = {"lnpu_torch", *(f"lnpu_torch.{name}" for name in PUBLIC_MODULES)}


def imports(file: Path) -> Iterator[str]:
    """Dotted names of the modules that a source file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{file.name}: imports are absolute"
            assert node.level == 0, f"{file.name}: imports are absolute"
            modules = [name.name for name in node.names if (PACKAGE / f"{name.name}.py").exists()]
            is_package = node.module == "lnpu_torch" and modules
            yield from (f"lnpu_torch.{name}" for name in modules) if is_package else (node.module,)


def own(file: Path) -> set[str]:
    return {name for name in imports(file) if name.split(".")[0] == "lnpu_torch"}


def run(code: str, *options: str, cwd: Path | None = None, path: str = str(ROOT)) -> str:
    """The output of a Python process of its own; it fails the test if the process fails."""
    command = [sys.executable, "-W", "error", *options, "-c", code]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_import_triton_torch_formats_and_geometries_only() -> None:
    allowed = ("lnpu_torch.quant.formats", "lnpu_torch.kernels", "lnpu_torch.ops.pair_counts.conv_shape")
    for file in (ROOT / "kernels").glob("*.py"):
        foreign = {name for name in imports(file) if name.split(".")[0] not in {*EXTERNAL_TO_KERNELS, "lnpu_torch"}}
        above = {name for name in own(file) if not name.startswith(allowed)}
        assert not foreign | above, f"{file.name} imports {sorted(foreign | above)}"


def test_recipes_use_the_public_interface_only() -> None:
    for file in (ROOT / "recipes").glob("*.py"):
        inner = {name for name in own(file) - PUBLIC if not name.startswith("lnpu_torch.recipes")}
        assert not inner, f"{file.name} imports {sorted(inner)}"


def test_integrations_use_the_public_interface_only() -> None:
    for file in (PACKAGE / "integrations").glob("*.py"):
        inner = {name for name in own(file) - PUBLIC if not name.startswith("lnpu_torch.integrations")}
        assert not inner, f"{file.name} imports {sorted(inner)}"


def public() -> Iterator[tuple[str, object]]:
    """All that a user is meant to call, and its methods, with names."""
    for module in (lnpu_torch, lnpu_torch.nn.modules, lnpu_torch.nn.functional):
        for name in dir(module):
            exported = name in lnpu_torch.__all__ if module is lnpu_torch else not name.startswith("_")
            found = getattr(module, name)
            if exported and getattr(found, "__module__", "").startswith(
                "lnpu_torch." if module is lnpu_torch else module.__name__
            ):
                yield f"{module.__name__}.{name}", found
                members = vars(found).items() if inspect.isclass(found) else ()
                own = [(key, inspect.unwrap(getattr(member, "fget", member))) for key, member in members]
                functions = [(key, each) for key, each in own if inspect.isfunction(each) and not key.startswith("_")]
                yield from ((f"{found.__module__}.{name}.{key}", each) for key, each in functions)


def test_all_that_is_public_says_what_it_is() -> None:
    silent = [name for name, found in public() if not (inspect.getdoc(found) or "").strip()]
    assert not silent
    assert len(list(public())) > 60


BLOCK = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"triton", "torchvision", "sklearn", "accelerate", "tensorboard", "matplotlib"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
"""


def test_import_needs_neither_triton_nor_the_recipes_extra() -> None:
    run(BLOCK + "import lnpu_torch, lnpu_torch.cli.app, lnpu_torch.recipes.train")


def test_who_only_prices_needs_no_torch() -> None:
    """Nor Numba, NumPy and matplotlib: they would take most of the time that a command takes to answer."""
    heavy = "assert not {'torch', 'numba', 'numpy', 'matplotlib'} & sys.modules.keys()"
    run(f"import sys, lnpu_torch.cli.app as cli; from lnpu_torch import chip, price, sweep, compare; {heavy}")
    commands = ["--version", "chips", "chips lnpu", *(f"{name} --help" for name in ("price", "sweep", "report"))]
    for command in commands:
        run(f"import sys, lnpu_torch.cli.app as cli; cli.app({command.split()}, standalone_mode=False); {heavy}")


def test_all_public_names_are_found_and_none_that_is_unknown() -> None:
    assert set(lnpu_torch.__all__) <= set(dir(lnpu_torch))
    assert all(getattr(lnpu_torch, name) is not None for name in lnpu_torch.__all__)
    assert run("import lnpu_torch.versions, lnpu_torch as lnpu; print(callable(lnpu.versions))").strip() == "True"
    with pytest.raises(AttributeError, match="has no attribute 'prise'"):
        lnpu_torch.prise  # type: ignore[attr-defined]  # noqa: B018


def test_import_changes_nothing_but_its_own_namespace(tmp_path: Path) -> None:
    state = (
        "(torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), torch.get_rng_state().tolist(), "
        "torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), "
        "torch.nn.Linear.forward, torch.nn.functional.conv2d, warnings.filters[:], dict(os.environ), os.getcwd(), "
        "signal.getsignal(signal.SIGINT), threading.active_count(), os.listdir())"
    )
    modules = "import os, signal, threading, warnings, torch, numpy, pydantic, yaml, rich.console, rich.table"
    ours = "import lnpu_torch; [getattr(lnpu_torch, name) for name in lnpu_torch.__all__]"
    code = f"{modules}\nbefore = {state}\n{ours}\nassert {state} == before"
    assert run(code, cwd=tmp_path) == ""


def test_a_checkout_on_the_path_finds_its_parts(tmp_path: Path) -> None:
    # -S leaves out site-packages' .pth files, and with them an editable install; the libraries are named by hand.
    path = os.pathsep.join([str(ROOT), sysconfig.get_paths()["purelib"]])
    code = (
        "import lnpu_torch.kernels, lnpu_torch.recipes.train, lnpu_torch.files as c\n"
        "print(lnpu_torch.__file__, *c.builtin_names('chips'), *c.builtin_names('recipes'))"
    )
    found = run(code, "-S", cwd=tmp_path, path=path)
    assert str(PACKAGE) in found
    assert "lnpu-fp16" in found
    assert "digits_resnet18" in found


def test_issue_templates_can_be_chosen() -> None:
    """A page for issues reads a name and what it is about from the head of each file."""
    texts = [path.read_text() for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.md")]
    heads = [yaml.safe_load(text.split("---\n")[1]) for text in texts]
    assert len(heads) == 2 and all(head["name"] and head["about"] and head["labels"] for head in heads)


def test_the_pythons_that_are_said_to_be_supported_are_those_that_were_tried() -> None:
    declared = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    tried = (ROOT / "docs" / "limits.md").read_text().partition("## About machines")[2].partition("##")[0]
    assert declared and declared == re.findall(r"Python (3\.\d+)", tried)

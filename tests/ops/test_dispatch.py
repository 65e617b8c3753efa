"""Which backend is taken, and what is said where the fast one is missing."""

from __future__ import annotations

import importlib
import logging

import pytest

from lnpu_torch.ops import dispatch


@pytest.mark.parametrize(("backend", "project"), [("cpu", "numba"), ("gpu", "triton")])
def test_a_missing_project_is_named(
    backend: str, project: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {project!r}", name=project)

    monkeypatch.setattr(importlib, "import_module", missing)
    with caplog.at_level(logging.WARNING, "lnpu_torch"):
        assert dispatch.found.__wrapped__(backend) is dispatch.REFERENCE
    (said,) = caplog.messages
    assert said == f"{project} is not installed: plain torch computes on the {backend.upper()}, many times slower"


def test_another_fault_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'else'", name="else")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="else"):
        dispatch.found.__wrapped__("cpu")

"""Ranks that train together do what one process does with the same batches, and hold the same state."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

import lnpu_torch as lnpu
from helpers.processes import on_ranks
from helpers.small_run import QUIET, config, equal
from lnpu_torch.files import ConfigError
from lnpu_torch.recipes import train as recipe
from lnpu_torch.recipes.interrupts import Interrupts, Stopped
from lnpu_torch.recipes.run_folder import RunFolder

STATIC = """
input: {low: e4m3, high: fp16, threshold: 0}
weight: {low: e4m3, high: fp16, threshold: -14}
grad_output: {low: e4m3, high: fp16, threshold: 12}
result: fp32  # rounded to FP16, a batch's gradient is not the sum of its halves'
"""
PLAIN: dict[str, Any] = {
    "model": {"name": "vgg16_cifar", "width": 2, "batch_norm": False},
    "data": {"kind": "digits", "size": 32, "crop": 2, "flip": True, "cutout": 4},
    **{"epochs": 2, "limit": 4, "lr": 0.02},
    "batch_size": 16,  # of 32 samples or more sums on small grids are in another order
}
MACS = ("layer", "step", "macs", "padding", "not_run", "pairs")


def launched(rank: int) -> None:
    """What torchrun tells a process; the group itself is up already."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "OMP_NUM_THREADS": "1"}


def train_each(settings: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """On each rank, one run after another."""
    launched(dist.get_rank())
    return [recipe.train(config(**each), QUIET) for each in settings]


def macs(folder: Path) -> list[list[Any]]:
    """What each layer did in each step, without what depends on how often it was called."""
    counts = lnpu.Counts.merge(counts for _, counts in RunFolder(folder).counts())
    return [[getattr(entry, name) for name in MACS] for entry in counts.steps]


def test_two_ranks_do_what_one_process_does(tmp_path: Path) -> None:
    """With static thresholds and without batch norm: every MAC is the same, and the loss but for the order of sums."""
    (tmp_path / "static.yaml").write_text(STATIC)
    settings = [{**PLAIN, "precision": str(tmp_path / "static.yaml"), "accumulate": pieces} for pieces in (1, 2)]
    ranks = on_ranks(train_each, [{**each, "out": str(tmp_path / f"ranks{i}")} for i, each in enumerate(settings)])
    for i, each in enumerate(settings):
        alone = recipe.train(config(**each, out=str(tmp_path / f"alone{i}")), QUIET)
        assert macs(tmp_path / f"ranks{i}") == macs(tmp_path / f"alone{i}")
        for one, both, other in zip(alone, ranks[0][i], ranks[1][i], strict=True):
            assert both["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert both["train_accuracy"] == one["train_accuracy"] and both["test_accuracy"] == one["test_accuracy"]
            assert equal(both, other)  # and both ranks say so
        assert alone[0]["loss"] != alone[1]["loss"]
    counts = lnpu.Counts.merge(counts for _, counts in RunFolder(tmp_path / "ranks0").counts())
    for step in {entry.step for entry in counts.steps}:  # zeros, FP8 and FP16 on both sides: there was much to err in
        mine = [entry for entry in counts.steps if entry.step == step]
        assert all(sum(entry.pairs[i][j] for entry in mine) for i in range(3) for j in (1, 2))


def weights_and_thresholds(settings: dict[str, Any]) -> dict[str, Any]:
    launched(dist.get_rank())
    run = recipe.Run(config(**settings), QUIET)
    run.open(None, False)
    run.train_epoch(Interrupts())
    weights, drawn = dict(run.model.named_parameters()), torch.rand(4)
    run.test_accuracy()
    state = {"thresholds": lnpu.thresholds(run.model), "done": run.done, "buffers": dict(run.model.named_buffers())}
    return {"weights": weights, "drawn": drawn, **state}


def test_ranks_hold_equal_weights_and_thresholds_after_8_steps(tmp_path: Path) -> None:
    """With batch norm, and thresholds that follow what all ranks saw. What they draw at random is their own."""
    settings = {"limit": 8, "epochs": 1, "batch_size": 16, "out": str(tmp_path / "run")}
    first, second = on_ranks(weights_and_thresholds, settings)
    assert not torch.equal(first.pop("drawn"), second.pop("drawn"))
    assert first["done"] == 8 and equal(first, second)
    begun = recipe.Run(config(**{**settings, "out": None}), QUIET)
    assert not torch.equal(first["weights"]["conv1.weight"], begun.model.conv1.weight)


def whole_and_stopped_and_resumed(settings: dict[str, Any], whole: str, folder: str) -> str:
    """Of a second run one rank alone is told to stop, after the third step; all do, and go on."""
    train_each([{**settings, "out": whole}])
    step, taken = recipe.Run.step, list[int]()

    def counted(run: recipe.Run, pieces: Any, asked: int) -> list[float]:
        taken.append(1)
        told = signal.SIGTERM if len(taken) == 3 and dist.get_rank() == 1 else 0
        return step(run, pieces, told)

    recipe.Run.step = counted  # type: ignore[method-assign]
    try:
        recipe.train(config(**settings), QUIET, resume=folder)
    except Stopped as stopped:
        recipe.Run.step = step  # type: ignore[method-assign]
        recipe.train(config(**settings), QUIET, resume=folder)
        return f"{stopped.exit_code}: {stopped}"
    return "was not stopped"


def test_ranks_stop_together_and_go_on_together(tmp_path: Path) -> None:
    settings = {"model": {"name": "alexnet_cifar", "width": 2}, "data": {"kind": "digits", "size": 16}, "limit": 4}
    settings["checkpoint"] = {"keep": 9}
    folders = [str(tmp_path / name) for name in ("whole", "cut")]
    messages = on_ranks(whole_and_stopped_and_resumed, settings, *folders)
    assert all(message.startswith("0: Stopped after epoch 1, step 3 of 4.") for message in messages)
    ends = [RunFolder(tmp_path / name).checkpoints.newest(print) for name in ("whole", "cut")]
    assert equal(*ends)
    counts = RunFolder(tmp_path / "whole").counts()
    assert counts == RunFolder(tmp_path / "cut").counts()
    for later in RunFolder(tmp_path / "cut").checkpoints.files()[1:]:
        later.unlink()
    recipe.train(config(**settings), QUIET, resume=str(tmp_path / "cut"))  # alone, from where both were stopped
    alone = RunFolder(tmp_path / "cut").counts()
    macs = [[entry.macs for _, each in found for entry in each.steps] for found in (counts, alone)]
    assert macs[0] == macs[1]


def refusals(settings: list[dict[str, Any]]) -> list[str]:
    launched(dist.get_rank())
    messages = []
    for each in settings:
        with pytest.raises((ConfigError, Stopped)) as refused:
            recipe.train(config(**each), QUIET)
        messages.append(str(refused.value))
    return messages


def test_all_ranks_say_what_is_wrong(tmp_path: Path) -> None:
    """What one rank alone notices ends the others as well, rather than leave them waiting."""
    recipe.train(config(epochs=1, out=str(tmp_path / "taken")), QUIET)
    wrong = [{"batch_size": 31}, {"out": str(tmp_path / "taken")}]
    first, second = on_ranks(refusals, wrong)
    assert first == second
    assert "31 images cannot be shared evenly among 2 rank(s)" in first[0]
    assert "holds a run already" in first[1]

"""What a checkpoint holds: everything that the next step of a run depends on. It knows no files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import lnpu_torch as lnpu
from lnpu_torch.files import ConfigError
from lnpu_torch.recipes import distributed
from lnpu_torch.recipes.epoch_counter import Tallied
from lnpu_torch.recipes.schedule import make_schedule

if TYPE_CHECKING:
    from lnpu_torch.recipes.train import Run


def capture(run: Run) -> dict[str, Any]:
    """The run's state between two steps, on every rank: tensors and plain data."""
    state = {name: part.state_dict() for name, part in _parts(run).items()}
    state |= {"thresholds": lnpu.thresholds(run.model)} if run.config.emulated else {}
    state |= {"epoch": run.epoch, "done": run.done, "steps": run.steps, "sums": run.sums, "metrics": run.metrics}
    state |= {"updates": run.schedule.last_epoch}
    state["ranks"] = distributed.gather({"rng": _rng(run.device), "tallied": run.tallied.state()})
    return state


def restore(run: Run, state: dict[str, Any]) -> None:
    """Put a new run where the one was whose state this is.

    Settings that belong to optimizer and schedule are the new run's. If an epoch has another number of steps now, the
    one that was cut short begins anew.

    Raises:
        ConfigError: the state is that of another model, or of no run.
    """
    _check(state)
    try:
        for name, part in _parts(run).items():
            if name in state:
                part.load_state_dict(state[name])
        if run.config.emulated and "thresholds" in state:
            lnpu.load_thresholds(run.model, state["thresholds"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split("\n\t")[:2])  # torch names every tensor that does not fit; one is enough
        raise ConfigError(f"the checkpoint does not fit this model or precision: {reason}") from None
    run.epoch, run.metrics, updates = state["epoch"], state["metrics"], state["updates"]
    if state["steps"] == run.steps:
        run.done, run.sums = state["done"], state["sums"]
        _restore_ranks(run, state["ranks"])
    else:
        run.console.print(f"an epoch has {run.steps} steps now, and had {state['steps']}: the one begun begins anew")
        updates = (run.epoch - 1) * run.steps
    inner = run.optimizer.optimizer
    for group in inner.param_groups:
        group |= inner.defaults
    run.schedule = make_schedule(inner, run.config, run.steps * run.config.epochs, updates)


def _check(state: dict[str, Any]) -> None:
    """Numbers are numbers: some become part of a file's name."""
    counted = [state.get(name) for name in ("epoch", "done", "steps", "updates")]
    rows = state.get("metrics")
    if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) and isinstance(state.get("ranks"), list):
        counted += [row.get("epoch") for row in rows]
        if all(type(number) is int and number >= 0 for number in counted):
            return
    raise ConfigError("the checkpoint is not one of a run")


def _restore_ranks(run: Run, ranks: list[dict[str, Any]]) -> None:
    """What each rank has of its own. If there are more or fewer ranks now, the first takes what was counted."""
    tallied, own = [Tallied.of(rank["tallied"]) for rank in ranks], run.accelerator.process_index
    if len(ranks) == run.ranks:
        run.tallied = tallied[own]
        torch.set_rng_state(ranks[own]["rng"][0])
        if run.device.type == "cuda" and len(ranks[own]["rng"]) > 1:
            torch.cuda.set_rng_state(ranks[own]["rng"][1], run.device)
    else:
        whole = Tallied.merge(tallied)
        run.tallied = whole if own == 0 else Tallied(energies_pj=(0.0,) * len(whole.energies_pj))


def _rng(device: torch.device) -> list[Tensor]:
    """The states of torch's generators: the CPU's, then that of a GPU in use."""
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


def _parts(run: Run) -> dict[str, Any]:
    """What has a state_dict of its own."""
    parts = {"model": run.model, "optimizer": run.optimizer, "scaler": run.accelerator.scaler, "average": run.average}
    return {name: part for name, part in parts.items() if part is not None}

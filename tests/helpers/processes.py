"""Runs a function in processes of its own: as the ranks of a gloo group, or one that may be killed."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")  # it imports what is slow once, and forks from there
CONTEXT.set_forkserver_preload(["lnpu_torch.recipes.train", "accelerate", "torch.distributed"])
LIMIT_S = 120


def start(function: Callable[..., None], *arguments: Any) -> Any:
    """A process that runs the function, which must be importable."""
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    return process


def on_ranks(function: Callable[..., Any], *arguments: Any, ranks: int = 2) -> list[Any]:
    """Results of `function(*arguments)` on each rank of a gloo group; what one raises fails the test."""
    with tempfile.TemporaryDirectory() as folder:
        everyone = [start(_rank, rank, ranks, folder, function, arguments) for rank in range(ranks)]
        for process in everyone:
            process.join(timeout=LIMIT_S)
            process.kill()
        failed = [file.read_text() for file in Path(folder).glob("failed*")]
        assert not failed, failed[0]
        return [torch.load(Path(folder) / f"result{rank}", weights_only=False) for rank in range(ranks)]


def _rank(rank: int, ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = (Path(folder) / "store").as_uri()
    try:
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
        torch.save(function(*arguments), Path(folder) / f"result{rank}")
    except BaseException:
        (Path(folder) / f"failed{rank}").write_text(traceback.format_exc())
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

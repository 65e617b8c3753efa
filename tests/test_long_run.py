"""Runs that go on for long, in several threads, and beside forked processes."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lnpu_torch as lnpu
import long_run


@pytest.mark.slow
def test_10_000_steps_need_no_more_memory_than_2_000() -> None:
    found = long_run.train(10_000)
    assert found[-1][0] - found[1][0] < 4  # MiB; a kept float32 batch a step would be 25, a kept graph more
    assert found[-1][1] == found[1][1]


def test_a_kept_tensor_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that flat memory means something: what each step leaves behind shows in the figure."""
    kept, original = [], torch.randn

    def randn(*args: Any, **kwargs: Any) -> Tensor:
        memory = mmap.mmap(-1, 40 * 2**20)  # not from the allocator, which may have room left from earlier tests
        kept.append(torch.frombuffer(memory, dtype=torch.float32).fill_(1))
        return original(*args, **kwargs)

    monkeypatch.setattr(torch, "randn", randn)
    found = long_run.train(10)
    assert found[-1][0] - found[1][0] > 200


End = tuple[lnpu.Counts, list[Tensor], list[Tensor]]


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 4 + seed, 3), nn.ReLU(), nn.Flatten(), nn.Linear((4 + seed) * 36, 5)]
    return lnpu.convert(nn.Sequential(*layers), "fgmp")


def train(net: nn.Module, batches: Iterable[Tensor], meet: threading.Barrier | None = None) -> End:
    """Counts, weights and thresholds after a step for each batch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    with lnpu.CostCounter(net) as cost:
        for batch in batches:
            if meet:
                meet.wait()
            net(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    weights = [parameter.detach() for parameter in net.parameters()]
    return cost.counts, weights, list(lnpu.thresholds(net).values())


def same(a: End, b: End) -> bool:
    tensors = zip([*a[1], *a[2]], [*b[1], *b[2]], strict=True)
    return a[0] == b[0] and all(torch.equal(mine, theirs) for mine, theirs in tensors)


def batches() -> list[Tensor]:
    return list(torch.randn(12, 4, 3, 8, 8, generator=torch.Generator().manual_seed(3)))


def test_two_models_in_two_threads_do_not_mix_their_counts() -> None:
    expected, found = [train(model(seed), batches()) for seed in (1, 2)], dict[int, End]()
    meet = threading.Barrier(2, timeout=60)  # so that their steps run at the same time
    nets = {seed: model(seed) for seed in (1, 2)}

    def work(seed: int) -> None:
        found[seed] = train(nets[seed], batches(), meet)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in nets]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert same(found[1], expected[0]) and same(found[2], expected[1])
    assert expected[0][0] != expected[1][0]


class Rounded(Dataset[Tensor]):
    """Batches that a worker rounds, with the compiled loops that the parent has used too."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, place: int) -> Tensor:
        rounded = lnpu.quantize(batches()[place], "fgmp", threshold=3)
        assert isinstance(rounded, Tensor)
        return rounded


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_loader_gives_what_no_loader_gives() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)  # the parent's threads have run before it forks
    try:
        expected = train(model(1), [Rounded()[place] for place in range(12)])
        loader = DataLoader(Rounded(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
        for _ in range(2):
            assert same(train(model(1), loader), expected)
    finally:
        torch.set_num_threads(before)

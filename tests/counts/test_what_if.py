"""Counts made from counts: other zeros, other batches. They close, they say that they are estimates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import lnpu_torch as lnpu
from helpers.handmade import counts, lanes, network, step, with_lanes
from lnpu_torch.counts.schema import Counts, StepCounts
from lnpu_torch.counts.vector_ops import NEVER, VectorOp, VectorOpCounts, rounded
from lnpu_torch.files import ConfigError, validate


def checked(found: Counts) -> Counts:
    """The same counts, with every sum checked anew."""
    return validate(Counts, found.model_dump(), "test")


def test_nothing_changes_of_what_nothing_is_said() -> None:
    changed = network().with_sparsity({"layers": {"fc": {"input": 0.4}}})
    assert changed.steps[:3] == network().steps[:3]
    assert network().with_sparsity({}).steps == network().steps
    assert network().with_sparsity(network().densities()).steps == network().steps


def test_other_zeros_close() -> None:
    asked = {"default": {"input": 0.3, "grad_output": {"nonzero": 0.9, "fp8": 0.1}}, "layers": {"fc": {"weight": 0}}}
    changed = checked(network().with_sparsity(asked))
    for before, after in zip(network().steps, changed.steps, strict=True):
        assert (after.macs, after.padding, after.not_run) == (before.macs, before.padding, before.not_run)
    fc = changed.steps[3]
    assert fc.second.elements == (8, 0, 0)
    assert [row[1:] for row in fc.pairs] == [(0, 0)] * 3
    assert changed.steps[0].first.elements[0] == 7
    assert changed.densities().of("conv1", "forward", "input").nonzero == 0.3


def test_lanes_wait_as_they_did() -> None:
    entry = with_lanes(step(), first=lanes(4, 5, lambda config: 8))
    after = checked(counts(entry).with_sparsity({"default": {"input": 1}})).steps[0].first.lanes
    assert after and after.work == 10 and set(after.cycles_by_config) == {10, 16}
    none = with_lanes(
        step(pairs=((45, 0, 0), (0, 0, 0), (0, 0, 0)), first=(10, 0, 0)), first=lanes(4, 0, lambda config: 0)
    )
    after = checked(counts(none).with_sparsity({"default": {"input": 0.5}})).steps[0].first.lanes
    assert after and set(after.cycles_by_config) == {5}


def test_fewer_zeros_never_cost_less() -> None:
    energies = [
        lnpu.price(network().with_sparsity({"default": {"input": share, "grad_output": share}}), "lnpu").total.chip_zj
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    assert energies == sorted(energies)
    assert energies[0] < energies[-1]


@pytest.mark.parametrize(
    ("densities", "told"),
    [
        (
            {"default": {"input": 2}},
            "densities: default.input.nonzero: Input should be less than or equal to 1, got 2",
        ),
        ({"layers": {"conv3": {"input": 0.5}}}, "densities.layers.conv3: no such layer was counted (nearest: conv1)"),
    ],
)
def test_wrong_densities_are_refused(densities: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        network().with_sparsity(densities)
    assert str(error.value) == told


def test_an_estimate_says_so_wherever_it_goes(tmp_path: Path) -> None:
    changed = network().with_sparsity({"default": {"input": 0.5}})
    assert changed.estimate and not network().estimate
    changed.save(tmp_path / "counts.json")
    loaded = Counts.load(tmp_path / "counts.json")
    assert loaded == changed
    assert (network() + loaded).estimate == (loaded * 3).estimate == changed.estimate
    assert loaded.with_sparsity({"default": {"weight": 0.5}}).estimate == changed.estimate
    assert changed.with_batch(1, was=1).estimate == f"{changed.estimate}; batch 1 in place of 1"
    report = lnpu.price(loaded, "lnpu")
    assert f"ESTIMATE: {changed.estimate}" in str(report)
    assert report.to_dict()["estimate"] == changed.estimate
    assert all(row.estimate for row in (*report.rows, *report.by("layer").rows, report.total))
    measured = lnpu.price(network(), "lnpu")
    assert "ESTIMATE" not in str(measured)
    assert not measured.total.estimate and measured.to_dict()["estimate"] is None
    for text in (lnpu.sweep(loaded, ["lnpu"], {"sram_bytes": [1000]}), lnpu.sensitivity(loaded, ["lnpu"])):
        assert "ESTIMATE: " in str(text)


def batches(entry: StepCounts) -> list[tuple[int, tuple[int, int, int]]]:
    return [(calls.count, calls.sizes) for calls in entry.by_size]


def test_the_same_samples_in_other_batches() -> None:
    forward = step(first=(10, 6, 4), second=(0, 12, 4), calls=2, passed=(0, 1000, 0))  # 2 calls of 5 samples each
    update = VectorOp(
        kind="optimizer", phase="update", op="add", calls=2, read=32, written=16, operations=16, special=0,
        uses=((rounded(1000), 64, 32), (NEVER, 2, 2)),
    )  # fmt: skip
    relu = VectorOp(
        kind="activation", phase="forward", op="relu", calls=2, read=12, written=12, operations=12, special=0,
        layer="conv1", uses=((160, 12, 12),),
    )  # fmt: skip
    (call,) = forward.by_size
    strided = call.model_copy(update={"used": (5, 4, 5), "groups": 2})
    forward = forward.model_copy(update={"by_size": (strided,)})
    was = Counts(steps=(forward,), vector_ops=VectorOpCounts(entries=(relu, update)))
    now = checked(was.with_batch(3, was=5))
    entry = now.steps[0]
    assert (entry.calls, entry.macs, entry.pairs) == (4, forward.macs, forward.pairs)
    assert batches(entry) == [(1, (2, 8, 1)), (3, (6, 8, 3))]  # ten samples: three, three, three and one
    assert [(calls.used, calls.groups) for calls in entry.by_size] == [((1, 4, 1), 2), ((3, 4, 3), 2)]
    assert entry.first == forward.first and entry.second.elements == (0, 24, 8)
    assert [sum(calls.first) for calls in entry.by_size] == [2, 18]
    assert [calls.passed for calls in entry.by_size] == [(0, 256, 0), (0, 640, 0)]  # 58 whatever the batch
    assert isinstance(now.vector_ops, VectorOpCounts)
    after, updates = now.vector_ops.entries
    assert (after.calls, after.read, after.uses) == (4, 12, ((96, 12, 12),))
    assert (updates.calls, updates.read, updates.operations) == (4, 64, 32)
    assert updates.uses == ((640, 128, 64), (NEVER, 4, 4))


def test_a_batch_of_the_same_size_changes_nothing_but_the_last() -> None:
    found = network().with_batch(5, was=5)
    for before, after in zip(network().steps, found.steps, strict=True):
        assert after.model_copy(update={"by_size": before.by_size}) == before
        for mine, other in zip(after.by_size, before.by_size, strict=True):
            assert mine.model_copy(update={"pairs": None}) == other


@pytest.mark.parametrize(
    ("batch", "was", "told"),
    [
        (0, 5, "batch: 0 samples; a batch has 1 or more"),
        (1, -1, "was: -1 samples; a batch has 1 or more"),
        (1, 3, "was: in the largest call of conv1 forward 10 elements of input are not those of 3 samples"),
    ],
)
def test_wrong_batches_are_refused(batch: int, was: int, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        network().with_batch(batch, was)
    assert str(error.value) == told


def test_other_batches_need_the_sizes_of_calls() -> None:
    old = counts(step().model_copy(update={"by_size": ()}))
    with pytest.raises(ConfigError, match="conv1 forward: other batches need the sizes of calls"):
        old.with_batch(1, was=1)

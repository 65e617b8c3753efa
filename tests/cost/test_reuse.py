"""What goes through DRAM between layers and in updates: counted on small networks, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lnpu_torch as lnpu
from lnpu_torch.counts.vector_ops import Use, VectorOpCounts, rounded, sum_uses

BATCH, CHANNELS, SIZE = 4, 8, 8
RESULT = BATCH * CHANNELS * SIZE * SIZE
TINY, VAST = 16, 1 << 30  # bytes of SRAM


def convolutions(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, CHANNELS, 3, bias=False), *between, nn.Conv2d(CHANNELS, 4, 3, bias=False)]
    return lnpu.convert(nn.Sequential(*layers))


def images() -> Tensor:
    return torch.randn(BATCH, 3, SIZE + 2, SIZE + 2, generator=torch.Generator().manual_seed(0))


def seen(model: nn.Module, run: Callable[[], Any]) -> lnpu.Counts:
    run()  # so that an optimizer has its states
    with lnpu.CostCounter(model) as cost:
        run()
    return cost.counts


def words(counts: lnpu.Counts, kind: str, sram: int, phases: tuple[str, ...] = ("forward", "backward")) -> int:
    """Words of 16 bits that a kind of vector operations moves through DRAM."""
    report = lnpu.price(counts, lnpu.chip("lnpu").with_values({"sram_bytes": sram}))
    rows = [row for row in report.rows if row.layer == f"({kind})" and row.step in phases]
    return sum(row.dram_bits or 0 for row in rows) // 16


def test_batch_norm_in_training_passes_six_words_of_each_result_through_dram() -> None:
    """x is written and read again; its error is written; then x twice and the error once."""
    model = convolutions(nn.BatchNorm2d(CHANNELS))
    counts = seen(model, lambda: model(images()).sum().backward())
    small = 12 * CHANNELS  # scale, shift and statistics of a channel
    assert 6 * RESULT <= words(counts, "normalisation", TINY) <= 6 * RESULT + small
    assert words(counts, "normalisation", VAST) == 0
    assert words(counts, "normalisation", TINY, ("forward",)) == pytest.approx(2 * RESULT, abs=small)
    # with room for x and nothing more, forward keeps it, and backward does not: x is written for backward
    held = words(counts, "normalisation", 2 * (RESULT + 400), ("forward",))
    assert held <= small


def test_batch_norm_in_evaluation_works_on_what_passes() -> None:
    model = convolutions(nn.BatchNorm2d(CHANNELS)).eval()
    assert words(seen(model, lambda: model(images())), "normalisation", TINY) <= 4 * CHANNELS


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6])
def test_of_a_relu_a_bit_of_each_element_is_kept(activation: type[nn.ReLU], inplace: bool) -> None:
    model = convolutions(activation(inplace=inplace))
    counts = seen(model, lambda: model(images()).sum().backward())
    assert words(counts, "activation", TINY) == 2 * RESULT // 16
    assert words(counts, "activation", VAST) == 0


def test_a_residual_is_written_and_read_where_it_is_added() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    block = Residual(nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS))
    model = convolutions(nn.ReLU(), block).eval()
    assert words(seen(model, lambda: model(images())), "other", TINY) == 2 * RESULT


def test_sums_of_gradients_read_what_is_there() -> None:
    model = convolutions()
    weights = sum(p.numel() for p in model.parameters())

    def run() -> None:
        model.zero_grad()
        for _ in range(3):
            model(images()).sum().backward()

    assert words(seen(model, run), "other", TINY) == 2 * weights


SGD = {"lr": 0.1, "momentum": 0.9}
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any], int]] = {
    # words of a parameter: the gradient, 1; what stays, 2 + 2 each; the parameter in FP16, 1
    "sgd": (torch.optim.SGD, {"lr": 0.1}, 1 + 4 + 1),
    "momentum": (torch.optim.SGD, SGD, 1 + 2 * 4 + 1),
    "nesterov": (torch.optim.SGD, {**SGD, "nesterov": True}, 1 + 2 * 4 + 1),
    "decay": (torch.optim.SGD, {**SGD, "weight_decay": 0.1, "nesterov": True}, 1 + 2 * 4 + 1),
    "adam": (torch.optim.Adam, {}, 1 + 3 * 4 + 1),
    "adamw": (torch.optim.AdamW, {}, 1 + 3 * 4 + 1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_update_costs_what_its_algorithm_does(name: str) -> None:
    """Whichever of its codes torch runs, to the zeptojoule."""
    optimizer, settings, per_parameter = OPTIMIZERS[name]
    energies = []
    for how in ({"foreach": False, "fused": False}, {"foreach": True}, {"fused": True}):
        model = convolutions()
        update = optimizer(model.parameters(), **settings, **how)

        def run(model: nn.Module = model, update: torch.optim.Optimizer = update) -> None:
            update.zero_grad()
            model(images()).sum().backward()
            update.step()

        counts = seen(model, run)
        (row,) = (row for row in lnpu.price(counts, "lnpu").rows if row.step == "update")
        energies.append((row.energy_zj, row.bits))
        weights = sum(p.numel() for p in model.parameters())
        assert words(counts, "optimizer", TINY, ("update",)) == per_parameter * weights
        assert words(counts, "optimizer", VAST, ("update",)) == 0
    assert energies[0] == energies[1] == energies[2]


def test_parameters_have_the_width_that_they_are_held_in() -> None:
    model = convolutions().to(torch.bfloat16)
    update = torch.optim.SGD(model.parameters(), lr=0.1)

    def run() -> None:
        update.zero_grad()
        model(images().bfloat16()).float().sum().backward()
        update.step()

    weights = sum(p.numel() for p in model.parameters())
    assert words(seen(model, run), "optimizer", TINY, ("update",)) == 3 * weights  # and no second copy


def test_a_loss_scale_is_folded_into_the_update() -> None:
    moved = []
    for enabled in (False, True):
        model = convolutions()
        update, scaler = (
            torch.optim.SGD(model.parameters(), lr=0.1),
            torch.amp.GradScaler("cpu", init_scale=2.0, enabled=enabled),
        )

        def run(model: nn.Module = model, update: Any = update, scaler: Any = scaler) -> None:
            update.zero_grad()
            scaler.scale(model(images()).sum()).backward()
            scaler.step(update)
            scaler.update()

        moved.append(words(seen(model, run), "optimizer", TINY, ("update",)))
    assert moved[0] == moved[1] > 0


def test_sram_size_decides_what_goes_out() -> None:
    """From a chip that holds nothing to one that holds everything but images: less and less traffic."""
    model = convolutions(nn.BatchNorm2d(CHANNELS), nn.ReLU())
    update = torch.optim.SGD(model.parameters(), **SGD)

    def run() -> None:
        update.zero_grad()
        model(images()).sum().backward()
        update.step()

    counts = seen(model, run)
    totals = [
        lnpu.price(counts, lnpu.chip("lnpu").with_values({"sram_bytes": size})).total.dram_bits or 0
        for size in (TINY, 2000, 6000, 20000, 60000, 200000, VAST)
    ]
    assert totals == sorted(totals, reverse=True) and len(set(totals)) >= 5
    image = lnpu.price(counts, "lnpu").rows[0]
    assert totals[-1] < 2 * 18 * images().numel() and totals[-1] <= (image.dram_bits or 0)
    assert totals[0] > 10 * totals[-1]


def test_a_step_again_and_again_is_that_step_so_many_times() -> None:
    model = convolutions(nn.BatchNorm2d(CHANNELS), nn.ReLU())
    update = torch.optim.SGD(model.parameters(), lr=0.0)

    def run() -> None:
        update.zero_grad()
        model(images()).sum().backward()
        update.step()

    once = seen(model, run)
    with lnpu.CostCounter(model) as cost:
        for _ in range(3):
            run()
    assert [each.by_size[0].passed for each in cost.counts.steps if each.by_size] == [
        each.by_size[0].passed for each in once.steps if each.by_size
    ]


def test_vector_operations_stand_with_the_layer_that_they_follow() -> None:
    model = convolutions(nn.ReLU())
    vector_ops = seen(model, lambda: model(images()).sum().backward()).vector_ops
    assert isinstance(vector_ops, VectorOpCounts)
    found = {(entry.op, entry.phase): entry.layer for entry in vector_ops.entries}
    assert (found["relu", "forward"], found["threshold_backward", "backward"]) == ("0", "2")


@pytest.mark.parametrize(("distance", "up"), [(0, 0), (15, 15), (16, 16), (17, 18), (1000, 1024), (1025, 1152)])
def test_distances_are_rounded_up_to_four_digits(distance: int, up: int) -> None:
    assert rounded(distance) == up


def test_uses_add_up_by_distance() -> None:
    assert sum_uses([Use(9, 1, 2), Use(3, 4, 5), Use(9, 10, -1)]) == ((3, 4, 5), (9, 11, 1))

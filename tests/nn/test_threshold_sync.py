"""Ranks that share their thresholds hold the same ones, chosen as one process would from everything that they saw."""

import pytest
import torch
from torch import distributed as dist
from torch import nn

import lnpu_torch as lnpu
from helpers.processes import on_ranks
from lnpu_torch import ConfigError, Precision, Rule
from lnpu_torch.ops.quantize.reference import UNSET, choose_threshold

MIXED = Precision(input=Rule(threshold=3), weight=Rule(), grad_output=Rule(high=None))


def model(precision):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    return lnpu.convert(net, precision)


def batches(count):
    """Batches of 8: the halves of one differ in size, and so does each batch from the last."""
    random = torch.Generator().manual_seed(1)
    size = torch.tensor([1.0, 64.0]).repeat_interleave(4).reshape(8, 1, 1, 1)
    return torch.randn(count, 8, 3, 8, 8, generator=random) * size * 3.0 ** torch.arange(count).reshape(-1, 1, 1, 1, 1)


def shared_steps(precision, count):
    """Thresholds of a rank after each of `count` steps, and its counts of all of them."""
    net, rank = model(precision), dist.get_rank()
    shared, seen = lnpu.ThresholdSync(net), []
    with lnpu.CostCounter(net) as cost:
        for images in batches(count):
            net(images[4 * rank : 4 * rank + 4]).square().sum().backward()
            shared.all_reduce()
            seen.append(lnpu.thresholds(net))
    return seen, cost.counts


def test_ranks_choose_as_one_process_would_from_all_they_saw():
    """Small tensors are looked at whole, so that the ranks' samples together are the one process's."""
    (first, _), (second, _) = on_ranks(shared_steps, "fgmp", 1)
    alone = model("fgmp")
    alone(batches(1)[0]).square().sum().backward()
    expected = lnpu.thresholds(alone)
    assert all(torch.equal(first[0][name], second[0][name]) for name in expected)
    # what a rank computes with in its first step is its own T, so that only the first layer's input is alike
    assert torch.equal(first[0]["0"][0], expected["0"][0])
    assert torch.equal(first[0]["0"][1], expected["0"][1])
    assert first[0]["0"][0, 0] == first[0]["0"][0, 1] != UNSET


def shared_steps_of_all(precisions):
    return [shared_steps(precision, 3) for precision in precisions]


def test_ranks_hold_equal_thresholds_after_every_step():
    precisions = ["fgmp", "fp8", MIXED, "fp16"]
    ranks = on_ranks(shared_steps_of_all, precisions)
    for precision, (first, counts), (second, others) in zip(precisions, *ranks, strict=True):
        for one, other in zip(first, second, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
        assert (precision == "fp16") == torch.equal(first[0]["3"], first[2]["3"])
        alone, both = model(precision), lnpu.Counts.merge([counts, others])
        with lnpu.CostCounter(alone) as cost:
            for images in batches(3):
                alone(images).square().sum().backward()
        assert [entry.macs for entry in both.steps] == [entry.macs for entry in cost.counts.steps]


def thresholds_of_shrinking_batches(precision):
    """Thresholds of the first layer's input after each of two steps, the second of smaller numbers."""
    net, rank = model(precision), dist.get_rank()
    shared, seen = lnpu.ThresholdSync(net), []
    for images in batches(3)[[2, 0]]:
        net(images[4 * rank : 4 * rank + 4]).square().sum().backward()
        shared.all_reduce()
        seen.append(lnpu.thresholds(net)["0"][0].tolist())
    return seen


@pytest.mark.parametrize(("precision", "rule"), [("fgmp", Rule()), ("fp8", Rule(high=None))])
def test_what_was_merged_is_forgotten(precision, rule):
    unseen = torch.tensor(UNSET, dtype=torch.int32)
    expected = [[int(choose_threshold(images, rule, unseen))] * 2 for images in batches(3)[[2, 0]]]
    assert expected[0] != expected[1]
    assert on_ranks(thresholds_of_shrinking_batches, precision) == [expected] * 2


@pytest.fixture
def one_rank():
    """This process as the only rank of a group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("rule", [Rule(), Rule(fp16_share=0.1), Rule(high="e6m9"), Rule(high=None)])
def test_the_choice_from_a_histogram_is_the_choice_from_its_tensor(rule, one_rank):
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 1000, generator=random) * size for size in (1.0, 1e-3, 300.0, 1e6, 1e-12, 0.0)]
    layers = lnpu.convert(nn.ModuleList(nn.Linear(1000, 1) for _ in tensors), Precision(input=rule))
    lnpu.load_thresholds(layers, {name: torch.full_like(x, 7) for name, x in lnpu.thresholds(layers).items()})
    shared = lnpu.ThresholdSync(layers)
    for layer, x in zip(layers, tensors, strict=True):
        layer(x).sum().backward()
    shared.all_reduce()
    fallback = torch.tensor(7, dtype=torch.int32)
    expected = [[int(choose_threshold(x, rule, fallback))] * 2 for x in tensors]
    assert [x[0].tolist() for x in lnpu.thresholds(layers).values()] == expected
    assert len({used for used, _ in expected}) > 3


def test_without_ranks_there_is_nothing_to_share():
    with pytest.raises(ConfigError, match="init_process_group"):
        lnpu.ThresholdSync(model("fgmp"))
    with pytest.raises(ConfigError, match="no layer of this model is emulated"):
        lnpu.ThresholdSync(nn.Linear(2, 2))


class Head(nn.Module):
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


def shared_steps_of_sites(count):
    """Thresholds of a rank whose sites are first seen in its first step."""
    torch.manual_seed(0)
    net, rank = lnpu.convert(nn.Sequential(nn.Linear(8, 8), Head())), dist.get_rank()
    shared, seen = lnpu.ThresholdSync(net), []
    for step in range(count):
        x = torch.randn(2, 2, 4, 8, generator=torch.Generator().manual_seed(step))[rank] * 8.0**rank
        net(x).square().sum().backward()
        shared.all_reduce()
        seen.append(lnpu.thresholds(net))
    return seen


def test_ranks_hold_equal_thresholds_of_sites_that_are_new():
    for one, other in zip(*on_ranks(shared_steps_of_sites, 3), strict=True):
        assert one.keys() == other.keys() == {"0", "1:matmul", "1:matmul.2"}
        assert all(torch.equal(one[name], other[name]) for name in one)

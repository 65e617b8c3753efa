"""Lane profiles of real layers, as counted in training, against lanes walked one by one over the same masks."""

import itertools
import statistics

import pytest
import torch
from torch.nn import functional as F

import lnpu_torch as lnpu
from helpers.lane_simulator import Simulator
from lnpu_torch.counts.lane_configs import BALANCE_GROUPS, LANE_CONFIGS, LANES, SYNC_INTERVALS, LaneConfig
from lnpu_torch.counts.schema import OPERANDS
from lnpu_torch.nn.layer_state import LayerState
from lnpu_torch.nn.reads import READS
from lnpu_torch.recipes.models import ModelConfig, build

BETWEEN = (3, 6, 12, 20, 24, 40, 48, 96, 192, 768)
"""Lane counts that no profile is measured for."""
WITHIN = {"resnet18_cifar": (21, 20), "vgg16_cifar": (14, 12), "alexnet_cifar": (8, 0)}
"""Layers, and how many of them at least are within 3 % between LANE_CONFIGS. AlexNet's channels differ too much."""


def masks_and_counts(name, monkeypatch):
    """Masks of a training step's streamed operands, by layer and operand, and the step's counts."""
    torch.manual_seed(0)
    model = lnpu.convert(build(ModelConfig(name=name, width=32), 10, (3, 32, 32)), "fgmp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    classes, masks = 3 * F.avg_pool2d(torch.randn(10, 3, 32, 32), 5, 1, 2), {}
    names = {id(layer.emulation): name for name, layer in model.named_modules() if hasattr(layer, "emulation")}
    quantize = LayerState.quantize

    def recording(self, x, plan, *args):
        operand = quantize(self, x, plan, *args)
        if plan.request.wanted[3]:
            values = operand.half if operand.single is None else operand.single
            masks[names[id(self)], READS[plan.request.row][1]] = values != 0
        return operand

    monkeypatch.setattr(LayerState, "quantize", recording)
    for _ in range(8):
        labels = torch.randint(10, (16,))
        with lnpu.CostCounter(model) as cost:
            F.cross_entropy(model(classes[labels] + torch.randn(16, 3, 32, 32) / 2), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return masks, cost.counts


def profiles(counts):
    """Lane profiles by layer and operand; two steps that stream the same operand have the same one."""
    found = {}
    for entry in counts.steps:
        for name, operand in zip(OPERANDS[entry.step], (entry.first, entry.second), strict=True):
            if name == "weight":
                assert operand.lanes is None
            elif entry.not_run < entry.macs:
                assert found.setdefault((entry.layer, name), operand.lanes) == operand.lanes
    return found


@pytest.fixture(scope="module", params=WITHIN, ids=WITHIN.keys())
def trained(request):
    with pytest.MonkeyPatch.context() as monkeypatch:
        masks, counts = masks_and_counts(request.param, monkeypatch)
    return WITHIN[request.param], {key: Simulator(mask) for key, mask in masks.items()}, profiles(counts)


def test_configs_are_exact_and_the_rest_is_near(trained):
    (layers, near), simulators, measured = trained
    assert measured.keys() == simulators.keys() and len({layer for layer, _ in measured}) == layers
    errors = {layer: [] for layer, _ in measured}
    for key, profile in measured.items():
        for config, cycles in zip(LANE_CONFIGS, profile.cycles_by_config, strict=True):
            if config.lanes < 2 * profile.channels or config.lanes == LANES:
                assert cycles == profile.lane_cycles(config) == simulators[key].lane_cycles(config), (key, config)
        for config in itertools.starmap(LaneConfig, itertools.product(SYNC_INTERVALS, BALANCE_GROUPS, BETWEEN)):
            if config.lanes % config.balance_group == 0:
                exact = simulators[key].lane_cycles(config)
                errors[key[0]].append(abs(profile.lane_cycles(config) / exact - 1))
    assert sum(max(each) <= 0.03 for each in errors.values()) >= near
    assert statistics.mean(itertools.chain(*errors.values())) < 0.01


def test_more_lanes_cost_no_more_time_where_the_chip_grows_with_them(trained):
    for key, profile in trained[2].items():
        for interval, group in itertools.product(SYNC_INTERVALS, BALANCE_GROUPS):
            counts = sorted({group, *range(3 * group, LANES, 23 * group), *BETWEEN, 16, 64, 256, LANES})
            configs = [LaneConfig(interval, group, lanes) for lanes in counts if lanes % group == 0]
            shares = [profile.lane_cycles(config) / config.lanes for config in configs]
            assert all(more <= fewer * (1 + 1e-9) for fewer, more in itertools.pairwise(shares)), (key, interval, group)

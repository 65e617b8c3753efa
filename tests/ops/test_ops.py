"""Every op's implementations against the reference, bit by bit; and what torch asks of a registered op."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.conv_shapes import GEOMETRIES, operands, over_in_channels, over_out_channels, per_position
from helpers.tensors import all_patterns, identical, of_error_3_in_128, random_patterns, scalar
from lnpu_torch.counts.lane_configs import LANE_CONFIGS
from lnpu_torch.ops import dispatch
from lnpu_torch.ops.dispatch import backend_of
from lnpu_torch.ops.lanes import reference as lanes
from lnpu_torch.ops.pair_counts import reference as counting
from lnpu_torch.ops.quantize import reference
from lnpu_torch.ops.quantize import torch_ops as ops
from lnpu_torch.ops.quantize.reference import Request
from lnpu_torch.quant.precision import Rule

RULES = {
    "fgmp": Rule(),
    "e5m2": Rule(low="e5m2", fp16_share=0.2),
    "fp8": Rule(high=None),
    "fp16": Rule(low=None),
    "e6m9": Rule(high="e6m9"),
    "window": Rule(window=5),
    "fp8 window": Rule(high=None, window=15),
}
LAYOUTS = {
    "grid": ((7, 6, 5, 3), 7, 3),
    "linear": ((63, 500), 63, 1),
    "weight": ((12, 5, 3, 3), 4, 1),
    "depthwise weight": ((12, 1, 3, 3), 1, 1),
    "3d": ((3, 4, 5, 2, 3), 3, 2),
    "large": ((17, 64, 32, 9), 17, 1),
    "narrow": ((3, 35, 4, 5), 3, 1),
}
EVERYTHING = (True, True, True, True)


def round_and_count(x, threshold, *rest):
    return backend_of(x).round_and_count(x, threshold, None, Request(*rest))


def tensors(rounded):
    """What was rounded and counted, and the threshold."""
    return [torch.as_tensor(part) for part in rounded if part is not None]


def strides(x):
    """Strides of the dimensions in which there is a next element."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("t", [-100, -29, -3, 0, 5, 63])
def test_quantize_over_all_16_bit_inputs_and_random_patterns(rule, t):
    for x in (all_patterns(torch.bfloat16), all_patterns(torch.float16), random_patterns(100_001, 5)):
        values, groups, totals = ops.quantize(x, scalar(t), None, rule.model_dump_json(), 0, True)
        expected, expected_groups = reference.quantize(x, rule, scalar(t))
        assert identical(values, expected)
        assert torch.equal(groups, expected_groups)
        assert totals.tolist() == [int((groups == group).sum()) for group in (0, 8, 16)]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_nan_of_any_payload_is_in_the_group_of_the_large(rule):
    x = torch.tensor([0x7F800001, 0x7FC00000, 0x7FFFFFFF, -1, -0x400000], dtype=torch.int32).view(torch.float32)
    values, groups, totals = ops.quantize(x, scalar(5), None, rule.model_dump_json(), 0, True)
    assert torch.equal(values.view(torch.int32), x.view(torch.int32))
    assert set(groups.tolist()) == {16 if rule.high else 8} and totals.sum() == totals.max() == 5


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("t", [-90, -3, 0, 6, 63])
def test_fp8_ends_with_the_number_below_the_threshold(t, backend):
    tau = reference.tau(scalar(t), torch.float32)
    x = torch.stack((tau.nextafter(scalar(0.0).float()), tau, tau.nextafter(torch.tensor(torch.inf))))
    with dispatch.backend(backend):
        _, groups, _ = ops.quantize(torch.cat((x, -x)), scalar(t), None, Rule().model_dump_json(), 0, True)
    assert groups.tolist() == [8, 16, 16] * 2


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(("shape", "share", "groups"), LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("lies", ["contiguous", "channels_last"])
@pytest.mark.parametrize("joined", [False, True])
def test_round_and_count(rule, shape, share, groups, lies, joined):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
    if lies == "channels_last" and x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    for wanted in (EVERYTHING, (True, False, False, True), (False, True, True, False), (True, False, True, True)):
        arguments = (x, scalar(1), rule.model_dump_json(), 0, (share, groups), wanted, joined)
        ours = round_and_count(*arguments)
        with dispatch.backend("reference"):
            expected = round_and_count(*arguments)
        assert [part is None for part in ours[:5]] == [not each for each in (*wanted[:2], True, *wanted[2:])]
        for mine, theirs in zip(tensors(ours), tensors(expected), strict=True):
            assert torch.equal(mine, theirs) and strides(mine) == strides(theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    x = torch.randn(5, 6, 7).to(dtype)
    arguments = (x, scalar(1), Rule().model_dump_json(), 0, (5, 1), EVERYTHING)
    expected, groups = reference.quantize(x, Rule(), scalar(1))
    values, half, position, sample, profile, *_ = round_and_count(*arguments)
    assert torch.equal(values, expected) and torch.equal(half.to(values.dtype), expected)
    assert torch.equal(position[:, 0], per_position(groups)) and torch.equal(sample, counting.per_sample(groups, 1))
    assert torch.equal(profile, lanes.profile(lanes.runs_of(expected)))


def test_more_rows_than_a_packed_counter_holds():
    x = torch.ones(70_000, 2)
    x[:, 1] = 100.0
    rounded = round_and_count(x, scalar(4), Rule().model_dump_json(), 0, (70_000, 1), EVERYTHING)
    assert rounded.counts_over_batch.tolist() == [[[70_000, 0]], [[0, 70_000]]]


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_change_the_result(threads):
    before = torch.get_num_threads()
    x = torch.randn(16, 8, 40, 40)
    arguments = (x, scalar(1), Rule().model_dump_json(), 0, (16, 2), EVERYTHING)
    expected = round_and_count(*arguments)
    torch.set_num_threads(threads)
    try:
        assert all(
            torch.equal(a, b) for a, b in zip(*map(tensors, (round_and_count(*arguments), expected)), strict=True)
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_counted_steps(geometry):
    conv_input, conv_output, weight = operands(geometry)
    grids = [
        (per_position(groups), counting.per_sample(groups, geometry.groups).contiguous())
        for groups in (conv_input, conv_output)
    ]
    counters = []
    for name in ("auto", "reference"):
        counter = torch.zeros(3, counting.ROWS, counting.WIDTH, dtype=torch.int64)
        sizes = torch.zeros(3, counting.SIZES + 1, counting.CALL, dtype=torch.int64)
        with dispatch.backend(name):
            weights = (over_out_channels(weight, geometry.groups), over_in_channels(weight))
            held = torch.zeros(3, 2, len(LANE_CONFIGS), dtype=torch.int64)
            table, packed, profiles = (
                (counter, sizes, held),
                geometry.pack(),
                torch.arange(2 * len(LANE_CONFIGS)).view(2, -1),
            )
            ops_of = backend_of(table[0])
            first, second, third = (counting.StepCounters(*table, step) for step in range(3))
            ops_of.count_weight_step(first, grids[0][0], weights[0], profiles[1], packed, "conv_input")
            ops_of.count_weight_step(second, grids[1][0], weights[1], None, packed, "conv_output")
            ops_of.count_grid_step(third, *grids, [*profiles], packed, "conv_output")
        nothing = torch.zeros_like(profiles[0])
        expected = torch.stack((profiles[1], nothing, nothing, nothing, *profiles))
        assert torch.equal(held, expected.view_as(held))
        counters.append(counter)
    assert torch.equal(*counters)
    assert counters[0].sum((1, 2)).all()


@pytest.mark.parametrize("shape", [(1,), (3, 5), (40, 64, 32, 9)])
def test_chosen_thresholds(shape):
    x = torch.randn(shape).relu() + 0.1
    for rule in RULES.values():
        results = []
        for name in ("auto", "reference"):
            states = torch.full((2, 2), reference.UNSET, dtype=torch.int32)
            with dispatch.backend(name):
                used = backend_of(x).next_threshold(x, states, 1, rule.model_dump_json(), True)
                results.append((torch.as_tensor(used), states))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert states[0].tolist() == [reference.UNSET] * 2


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("above", range(8))
def test_a_share_of_fp16_may_be_met_exactly(above, backend):
    x = reference.tau(torch.arange(8, dtype=torch.int32), torch.float32)
    states, text = torch.full((1, 2), reference.UNSET, dtype=torch.int32), Rule(fp16_share=above / 8).model_dump_json()
    with dispatch.backend(backend):
        assert backend_of(x).next_threshold(x, states, 0, text, False) == 8 - above


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_error_may_be_met_exactly(backend):
    states, text = torch.full((1, 2), reference.UNSET, dtype=torch.int32), Rule(max_error=3 / 128).model_dump_json()
    with dispatch.backend(backend):
        assert backend_of(states).next_threshold(of_error_3_in_128(), states, 0, text, False) == 4  # all in FP8


STEPS = ((1, False, False), (1, True, True), (8, True, False), (30, True, True), (1, False, False))
"""The scale of an operand, whether it is seen in training, whether the T chosen then comes into use."""


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("joined", [False, True])
def test_an_operand_is_read_as_t_is_chosen_and_then_it_is_rounded(rule, dtype, joined):
    """Over steps in training, whose thresholds come into use or do not, and out of it."""
    text, generator = rule.model_dump_json(), torch.Generator().manual_seed(0)
    results: list[list[torch.Tensor]] = []
    for name, apart in (("auto", False), ("reference", False), ("auto", True)):
        states, found = torch.full((3, 2), reference.UNSET, dtype=torch.int32), []
        generator.manual_seed(0)
        for scale, training, commits in (
            (1, False, False),
            (1, True, True),
            (8, True, False),
            (30, True, True),
            (1, False, False),
        ):
            x = (scale * torch.randn(4, 20, 5, 7, generator=generator).relu()).to(dtype)
            x = x.to(memory_format=torch.channels_last) if scale == 8 else x
            rest = (text, 1, (4, 1), EVERYTHING, joined)
            with dispatch.backend(name):
                if apart:
                    used = backend_of(x).next_threshold(x, states, 1, text, training)
                    rounded = round_and_count(x, used, *rest)
                else:
                    rounded = backend_of(x).quantize_operand(x, states, None, Request(*rest), training)
                found += tensors(rounded)
                if commits:
                    states[..., 0] = states[..., 1]
            found.append(states.clone())
        results.append(found)
    for each in results[1:]:
        assert all(torch.equal(a, b) and strides(a) == strides(b) for a, b in zip(results[0], each, strict=True))
    assert (states[[0, 2]] == reference.UNSET).all()
    if rule.adaptive:
        assert len({int(used) for used in results[0][5::7]}) > 1


def test_unknown_backend():
    known = "unknown backend 'cuda'; known: auto, reference, triton"
    with pytest.raises(ValueError, match=known), dispatch.backend("cuda"):
        pass


@pytest.mark.parametrize("rule", [Rule(), Rule(fp16_share=0.2), Rule(high=None)], ids=["error", "share", "largest"])
def test_a_choice_of_plain_torch_reads_nothing_back(rule):
    """It would wait for a GPU, and end a CUDA graph's capture."""
    seen = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Reads():
        reference.choose_threshold(torch.randn(40, 30), rule, scalar(reference.UNSET))
    assert seen and torch.ops.aten._local_scalar_dense.default not in seen

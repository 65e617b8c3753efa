"""The kernel that reads an operand in Triton's interpreter, against the reference, bit by bit."""

import pytest
import torch

from helpers.tensors import LAYOUTS, same_signs_too, scalar, spread
from lnpu_torch.ops.lanes import reference as lanes
from lnpu_torch.ops.pair_counts import reference as counting
from lnpu_torch.ops.quantize import reference
from lnpu_torch.quant.precision import Rule

pytest.importorskip("triton")
pytestmark = pytest.mark.triton_interpreter
RULES = {
    "fgmp": Rule(),
    "e5m2": Rule(low="e5m2"),
    "e4m3": Rule(high=None),
    "fp16": Rule(low=None),
    "1-6-9": Rule(high="e6m9"),
    "share": Rule(fp16_share=0.3),
    "fixed": Rule(threshold=-7),
}


@pytest.fixture(params=[1, 500], ids=["few programs", "many programs"])
def kernels(request, monkeypatch):
    """The module; all memory that it allocates is full of garbage."""
    from lnpu_torch.kernels import operand

    for name in ("empty", "empty_strided"):
        make = getattr(torch, name)

        def poison(*args, make=make, **options):
            x = make(*args, **options)
            return x if x.is_meta else x.fill_(torch.nan if x.is_floating_point() else 77)

        monkeypatch.setattr(torch, name, poison)
    monkeypatch.setattr(operand, "processors", lambda device: request.param)
    return operand


def choice(rule):
    from lnpu_torch.ops.quantize import gpu

    return gpu.choice(rule)


def check(kernels, x, rule, layout, *, current=reference.UNSET, seed=None, training=True, threshold=None, joined=False):
    """Everything that is found of x: values, counts, runs, thresholds."""
    share, groups = layout
    states = torch.full((3, 2), current, dtype=torch.int32)
    chosen = reference.choose_threshold(x, rule, states[1, 0])
    used = chosen if current == reference.UNSET else states[1, 0]
    after = states.clone()
    if training:
        after[1] = torch.stack((used, chosen))
    used = scalar(rule.threshold_range[0]) if used == reference.UNSET else used
    used = used if threshold is None else threshold
    random = None if seed is None else reference.random_bits(x.shape, seed, 1)
    q, classes = reference.quantize(x, rule, used, random)
    joined = joined or x.dim() == 2
    along = kernels.finds_runs(x.shape, layout, joined)
    wanted = kernels.Wanted(True, rule.high != "e6m9", True, along, joined)
    by = {"states": states, "training": training} if threshold is None else {"threshold": threshold}
    got = kernels.read(x, choice(rule), rule.low, rule.high, layout, wanted, row=1, seed=seed, **by)
    for values in (got.single, got.half) if wanted.half else (got.single,):
        assert same_signs_too(values, q) and values.stride() == x.stride()
    assert torch.equal(got.position, counting.per_position(classes, share))
    assert torch.equal(got.sample, counting.per_sample(classes, groups, kernels.sample_dtype(x.shape[1], groups)))
    if along:
        runs = lanes.joined_runs(q) if joined else lanes.runs_of(q)
        assert torch.equal(got.runs, runs) and got.profile.tolist() == [0] * kernels.MEMBERS
    assert got.threshold == used
    assert threshold is not None or torch.equal(states, after)
    return got


GRIDS = [  # shape, samples that share a count, channel groups
    ((6, 6, 7, 9), 2, 3),
    ((5, 8, 4, 4), 5, 8),
    ((3, 20, 33), 3, 1),
    ((9, 130), 9, 1),
    ((2, 24, 2, 3, 2), 1, 2),
    ((1, 1, 1, 1), 1, 1),
    ((7, 3), 7, 3),
    ((2, 3, 40, 40), 2, 1),
    ((20, 40, 3, 3), 5, 1),
    ((3, 70, 5, 5), 3, 1),
    ((96, 24), 32, 1),
    ((60, 24), 20, 1),
    ((12, 8, 1, 1), 6, 2),
]


@pytest.mark.parametrize(("shape", "share", "groups"), GRIDS, ids=str)
def test_grids(kernels, shape, share, groups):
    for layout in ("contiguous", "channels_last"):
        x = LAYOUTS[layout](spread(*shape))
        if layout == "channels_last" and x.dim() != 4:
            continue
        check(kernels, x, Rule(), (share, groups))
        check(kernels, x.bfloat16(), Rule(), (share, groups), current=3, training=False)
        check(kernels, x.half(), Rule(), (share, groups), current=3, seed=torch.tensor(2**61 + 3))
        check(kernels, x, Rule(), (share, groups), threshold=scalar(1))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("current", [reference.UNSET, 5])
def test_rules(kernels, name, current):
    rule = RULES[name]
    x = LAYOUTS["channels_last"](spread(4, 33, 5, 5))
    if choice(rule).mode == 1:  # by the largest of all elements: chosen before
        check(kernels, x, rule, (4, 1), threshold=scalar(5))
        return
    for training in (True, False):
        check(kernels, x, rule, (4, 1), current=current, training=training)
        check(kernels, torch.zeros(3, 5, 2, 2), rule, (3, 1), current=current, training=training)


def test_rows_of_small_grids_are_joined(kernels):
    check(kernels, LAYOUTS["channels_last"](spread(33, 20, 1, 1)), Rule(), (33, 1), joined=True)
    check(kernels, LAYOUTS["channels_last"](spread(33, 20, 1, 1)), Rule(), (33, 1), joined=False)


def test_what_was_not_asked_for_is_not_there(kernels):
    x = spread(4, 6, 3, 3)
    got = kernels.read(x, choice(Rule()), "e4m3", "fp16", (4, 1), kernels.Wanted(sample=False), threshold=scalar(1))
    assert got.single is got.sample is got.runs is None and got.half is not None


def test_tensors_that_are_not_read_as_they_lie(kernels):
    taken = {name: kernels.takes(LAYOUTS[name](spread(4, 6, 3, 5))) for name in LAYOUTS}
    assert taken == {"contiguous": True, "channels_last": True} | dict.fromkeys([*LAYOUTS][2:], False)


def test_counts_by_sample_of_narrow_groups_are_bytes(kernels):
    x = LAYOUTS["channels_last"](torch.ones(2, 256, 3, 3))
    for groups, dtype in ((1, torch.int32), (2, torch.int32), (4, torch.uint8), (256, torch.uint8)):
        got = check(kernels, x, Rule(), (2, groups))
        assert got.sample.dtype == dtype


def test_what_is_refused(kernels):
    x, options = spread(4, 6, 3, 3), {"threshold": scalar(0)}
    for layout, message in (((4, 4), "6 channels do not divide by 4"), ((3, 1), "4 samples do not divide by 3")):
        with pytest.raises(ValueError, match=message):
            kernels.read(x, choice(Rule()), "e4m3", "fp16", layout, kernels.Wanted(), **options)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        kernels.read(x.double(), choice(Rule()), "e4m3", "fp16", (4, 1), kernels.Wanted(), **options)
    with pytest.raises(ValueError, match="go on from sample to sample"):
        joined = kernels.Wanted(runs=True, joined=True)
        kernels.read(x, choice(Rule()), "e4m3", "fp16", (4, 1), joined, **options)
    with pytest.raises(ValueError, match="in no single pass"):
        kernels.read(x.mT, choice(Rule()), "e4m3", "fp16", (4, 1), kernels.Wanted(), **options)
    with pytest.raises(ValueError, match="e6m9 do not fit float16"):
        kernels.read(x, choice(Rule()), "e4m3", "e6m9", (4, 1), kernels.Wanted(), **options)

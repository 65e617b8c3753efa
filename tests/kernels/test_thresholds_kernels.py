"""The kernel that chooses thresholds in Triton's interpreter, against the reference."""

import pytest
import torch

from helpers.tensors import of_error_3_in_128, spread
from lnpu_torch.ops.quantize import reference
from lnpu_torch.quant.precision import Rule

pytest.importorskip("triton")
pytestmark = pytest.mark.triton_interpreter
RULES = {
    "default": Rule(),
    "tight": Rule(max_error=0.003),
    "loose": Rule(max_error=0.05),
    "impossible": Rule(max_error=1e-6),
    "e5m2": Rule(low="e5m2"),
    "1-6-9": Rule(high="e6m9"),
    "e5m2, 1-6-9": Rule(low="e5m2", high="e6m9", max_error=0.03),
    "share": Rule(fp16_share=0.2),
    "no share": Rule(fp16_share=0.0),
    "largest": Rule(high=None),
    "fp16": Rule(low=None),
    "fixed": Rule(threshold=-7),
}


@pytest.fixture
def kernels(monkeypatch):
    from lnpu_torch.kernels import thresholds

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **options: empty(*args, **options).fill_(77))
    return thresholds


def choice(kernels, rule):
    chosen = {"max_error": rule.max_error, "fp16_share": rule.fp16_share, "threshold": rule.threshold}
    return kernels.Choice.of(rule.low, rule.high, **chosen)


def tensors():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    yield spread(31, 40)
    yield normal(3, 5, 7, 9).relu()
    yield normal(263, 500)  # more than a sample, so that elements are skipped
    yield normal(263, 500).T * 2.0**-20
    yield normal(50, 33)[:, ::3].half()
    yield (normal(4, 6, 8, 3) * 2.0**-24).half().to(memory_format=torch.channels_last)
    yield normal(900).exp().bfloat16()
    yield (normal(2000) * 3).exp()
    yield normal(2000) * 2.0**13
    yield torch.tensor(3.0)
    yield torch.tensor([0.0, torch.nan, torch.inf])
    yield torch.full((10,), 60000.0)
    for e in range(-27, 17, 4):
        yield 2.0**e * (1 + torch.arange(1200) / 400)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("current", [reference.UNSET, 5])
def test_choices(kernels, name, current):
    rule, differ = RULES[name], set()
    fallback = torch.tensor(current, dtype=torch.int32)
    for number, x in enumerate(list(tensors())[:: 1 if current == reference.UNSET else 5]):
        chosen = reference.choose_threshold(x, rule, fallback)
        used = chosen if current == reference.UNSET else fallback
        for training in (False, True) if number % 4 == 0 else (True,):
            states = torch.full((3, 2), current, dtype=torch.int32)
            got = kernels.choose(x, choice(kernels, rule), states, 1, training)
            assert got == (rule.threshold_range[0] if used == reference.UNSET else used)
            expected = torch.stack((used, chosen)) if training else torch.full((2,), current)
            assert torch.equal(states[1], expected.int()) and (states[[0, 2]] == current).all()
        differ.add(chosen.item())
    assert len(differ) > 5 or current != reference.UNSET or name in ("fixed", "fp16", "impossible", "no share")


@pytest.mark.parametrize("above", range(8))
def test_shares_that_are_met_exactly(kernels, above):
    x, states = reference.tau(torch.arange(8, dtype=torch.int32), torch.float32), torch.zeros(1, 2, dtype=torch.int32)
    kernels.choose(x, choice(kernels, Rule(fp16_share=above / 8)), states, 0, True)
    assert states[0, 1] == 8 - above


def test_an_error_that_is_met_exactly(kernels):
    states = torch.zeros(1, 2, dtype=torch.int32)
    kernels.choose(of_error_3_in_128(), choice(kernels, Rule(max_error=3 / 128)), states, 0, True)
    assert states[0, 1] == 4


def test_scratch_memory_is_left_as_it_was_found(kernels):
    """What one choice leaves behind, a smaller or a larger one of another kind does not read."""
    for name in ("default", "largest", "1-6-9", "share", "fixed", "default"):
        rule = RULES[name]
        for x in (spread(263, 500), spread(7, 3, 2).half()):
            states = torch.full((2, 2), reference.UNSET, dtype=torch.int32)
            used = kernels.choose(x, choice(kernels, rule), states, 1, True)
            assert used == states[1, 0] == reference.choose_threshold(x, rule, states[0, 0])


@pytest.mark.parametrize(("number", "name"), list(enumerate(RULES)))
def test_histograms(kernels, number, name):
    """Of every third tensor, from another one on for each rule."""
    rule = RULES[name]
    for x in list(tensors())[number % 3 :: 3]:
        counts = torch.full((300,), 2, dtype=torch.int32)
        states = torch.zeros(2, 2, dtype=torch.int32)
        kernels.choose(x, choice(kernels, rule), states, 1, False, counts)
        expected = torch.zeros(300, dtype=torch.int32)
        if rule.adaptive:
            expected[: choice(kernels, rule).bins] = reference.histogram(x, rule).int()
        elif name == "largest":
            expected[: choice(kernels, rule).bins] = reference.largest_bin(x, rule).int()
        assert torch.equal(counts - 2, expected)


def test_constants(kernels):
    assert (kernels.SAMPLE, kernels.RANGE.value) == (reference.SAMPLE, reference.RANGE)
    assert kernels.UNSET.value == reference.UNSET
    for rule in RULES.values():
        assert (choice(kernels, rule).smallest, choice(kernels, rule).largest) == rule.threshold_range


def test_what_is_refused(kernels):
    x, states = torch.ones(4), torch.zeros(1, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match="not 0"):
        kernels.choose(x[:0], choice(kernels, Rule()), states, 0, True)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        kernels.choose(x.double(), choice(kernels, Rule()), states, 0, True)
    with pytest.raises(TypeError, match=r"states is torch\.int64"):
        kernels.choose(x, choice(kernels, Rule()), states.long(), 0, True)
    with pytest.raises(ValueError, match="different devices"):
        kernels.choose(x, choice(kernels, Rule()), states.to("meta"), 0, True)

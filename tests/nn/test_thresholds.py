"""How T is chosen, kept and put into use."""

import numpy as np
import pytest
import torch
from torch import nn

import lnpu_torch as lnpu
from lnpu_torch import ConfigError, Precision, Rule
from lnpu_torch.nn.reads import READS
from lnpu_torch.ops.quantize.reference import (
    RANGE,
    SAMPLE,
    UNSET,
    choose_threshold,
    error_table,
    histogram,
    quantize,
    strided_sample,
    tau,
)

UNSEEN = torch.tensor(UNSET, dtype=torch.int32)


def choose(x, rule, fallback=UNSEEN):
    t = choose_threshold(x, rule, fallback)
    assert t.dtype == torch.int32 and t.dim() == 0
    return t


def relative_error(x, q):
    return ((q - x).norm() / x.norm()).item()


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 300.0])
@pytest.mark.parametrize("max_error", [0.008, 0.013, 0.02])
def test_max_error_is_kept_and_no_fp16_wasted(scale, max_error):
    x, rule = gaussian(SAMPLE) * scale, Rule(max_error=max_error)
    t = choose(x, rule)
    measured = relative_error(x, quantize(x, rule, t)[0])
    assert measured <= 1.03 * max_error
    if t < rule.threshold_range[1]:
        assert relative_error(x, quantize(x, rule, t + 1)[0]) > 0.97 * max_error


@pytest.mark.parametrize("scale", [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8])
def test_default_bound_on_a_gaussian(scale):
    """As `MAX_ERROR` says; and all in FP8 a Gaussian errs by 0.024 (numerics)."""
    x = gaussian(SAMPLE) * scale
    groups = quantize(x, Rule(), choose(x, Rule()))[1]
    assert 0.26 < (groups == 16).float().mean().item() < 0.38
    fp8 = Rule(high=None)
    assert relative_error(x, quantize(x, fp8, choose(x, fp8))[0]) == pytest.approx(0.024, abs=0.003)


def test_everything_in_fp8_takes_the_tightest_window():
    x = torch.tensor([1.0, -2.0, 3.0])
    assert choose(x, Rule(max_error=0.5)) == 4 * 1 + 2 + 1  # one above 3 = 2 (1 + 2/4)


def test_impossible_bound_gives_fp16():
    x = gaussian(1000) * 2.0**-26  # below binary16
    assert choose(x, Rule()) == Rule().threshold_range[0]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_fp16_share(share):
    x, rule = gaussian(SAMPLE).relu(), Rule(fp16_share=share)
    t = choose(x, rule)
    above = lambda t: (x >= tau(t, x.dtype)).sum() / (x > 0).sum()  # noqa: E731
    assert above(t) <= share
    if t > rule.threshold_range[0]:
        assert above(t - 1) > share


def test_fp16_share_where_even_the_largest_threshold_leaves_more():
    assert choose(torch.full((10,), 60000.0), Rule(fp16_share=0.1)) == 63


def test_static_threshold():
    assert choose(gaussian(10), Rule(threshold=-5)) == -5


@pytest.mark.parametrize(("largest", "t"), [(1.0, 1), (1.74, 3), (1.75, 4), (447.0, 35), (1e30, 63), (1e-30, -100)])
def test_uniform_fp8_window_ends_over_the_largest(largest, t):
    x = torch.tensor([largest / 3, -largest, torch.nan, torch.inf, 0.0])
    assert choose(x, Rule(high=None)) == t


@pytest.mark.parametrize("x", [torch.zeros(5), torch.empty(0), torch.tensor([torch.nan, torch.inf])])
@pytest.mark.parametrize("rule", [Rule(), Rule(fp16_share=0.2), Rule(high=None)])
def test_nothing_to_choose_from_keeps_the_old(x, rule):
    assert choose(x, rule, torch.tensor(7, dtype=torch.int32)) == 7


def test_histogram_counts_quarter_binades():
    x = torch.tensor([1.0, 1.24, 1.25, 1.75, 2.0, -3.5, 0.0, torch.nan, torch.inf, 1e-30, 1e30])
    counts = histogram(x, Rule())
    smallest = Rule().threshold_range[0]
    expected = {0: 2, 1: 1, 3: 1, 4: 1, 7: 1, smallest - 1: 1, 63: 1}
    assert {int(i) + smallest - 1: int(counts[i]) for i in counts.nonzero().flatten()} == expected


def test_sample_is_spread_and_ignores_strides():
    x = torch.arange(64 * 32 * 64 * 32).reshape(64, 32, 64, 32).float()
    sample = strided_sample(x)
    assert SAMPLE * 0.95 <= len(sample) <= SAMPLE
    assert len(torch.unique(sample % 32)) == 32 and len(torch.unique(sample // 32 % 64)) == 64
    assert torch.equal(strided_sample(x.to(memory_format=torch.channels_last)), sample)
    assert torch.equal(strided_sample(x[:2, :2, :2, :2].transpose(0, 3)), x[:2, :2, :2, :2].transpose(0, 3).flatten())


@pytest.mark.parametrize("t", [-101, 64])
def test_threshold_out_of_range(t):
    with pytest.raises(ValueError, match=rf"threshold {t} is outside -100 \.\.\. 63"):
        lnpu.quantize(torch.ones(1), "fgmp", threshold=t)


def test_public_quantize():
    x = gaussian(1000).half().requires_grad_()
    q, groups = lnpu.quantize(x, "fgmp", threshold=0, return_classes=True)
    assert q.dtype == torch.float16 and set(groups.tolist()) == {8, 16}
    assert torch.equal(groups == 16, x.detach().abs() >= 1)
    q.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    with pytest.raises(ConfigError, match=r"unknown rule 'fgpm' .*fgmp"):
        lnpu.quantize(x, "fgpm")
    with pytest.raises(ValueError, match="without FP8 has no threshold"):
        lnpu.quantize(x, "fp16", threshold=0)


def layer_and_rows():
    layer = lnpu.nn.Linear(16, 16)
    return layer, layer.emulation.thresholds


def step(layer, x):
    layer(x.requires_grad_()).square().sum().backward()


def test_first_step_uses_its_own_threshold_and_the_next_one_the_last():
    layer, thresholds = layer_and_rows()
    small, large = gaussian(64, 16), gaussian(64, 16) * 64
    step(layer, small)
    assert thresholds[0, 0] == choose(small, Rule())
    output = layer(large)
    assert thresholds[0].tolist() == [choose(small, Rule()), choose(large, Rule())]  # chosen, not yet in use
    output.sum().backward()
    assert thresholds[0, 0] == choose(large, Rule())


def test_eval_changes_nothing():
    layer, thresholds = layer_and_rows()
    layer.eval()
    x = gaussian(64, 16)
    unseen = layer(x)
    step(layer, x * 32)
    assert (thresholds == UNSET).all()
    layer.train()
    step(layer, x)
    layer.eval()
    before = thresholds.clone()
    assert torch.equal(layer(x), lnpu.nn.Linear.forward(layer, x)) and unseen.shape == (64, 16)
    step(layer, x * 32)
    assert torch.equal(thresholds, before)


def test_checkpointing_recomputes_with_the_same_threshold():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    plain = nn.Sequential(lnpu.nn.Linear(16, 16), nn.ReLU(), lnpu.nn.Linear(16, 4))
    torch.manual_seed(0)
    saving = nn.Sequential(lnpu.nn.Linear(16, 16), nn.ReLU(), lnpu.nn.Linear(16, 4))
    for scale in (1.0, 64.0, 0.01):
        x = gaussian(32, 16) * scale
        plain(x).square().sum().backward()
        checkpoint(saving, x.requires_grad_(), use_reentrant=False).square().sum().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    a, b = lnpu.thresholds(plain), lnpu.thresholds(saving)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_equal_rules_share_one_threshold_and_unlike_ones_do_not():
    shared = lnpu.nn.Linear(4, 4)
    own = lnpu.nn.Linear(4, 4, precision=Precision(input="fgmp", grad_weight={"input": "fp8"}))
    for layer in (shared, own):
        step(layer, gaussian(8, 4))
    used = lambda layer: (layer.emulation.thresholds[:, 0] != UNSET).tolist()  # noqa: E731
    assert used(shared) == [True, True, True, False, False, False]
    assert used(own) == [True, False, False, False, True, False]


def test_every_read_with_a_rule_of_its_own_puts_its_threshold_into_use():
    steps = {name: {} for name, _ in READS}
    for i, (name, operand) in enumerate(READS):
        steps[name][operand] = Rule(max_error=0.01 + 0.001 * i)
    layer, thresholds = lnpu.nn.Linear(16, 16, precision=Precision(**steps)), []
    for scale in (1.0, 64.0):
        step(layer, gaussian(64, 16) * scale)
        thresholds.append(layer.emulation.thresholds.clone())
    assert (thresholds[1][:, 0] == thresholds[1][:, 1]).all() and (thresholds[0] != thresholds[1])[[0, 2, 4, 5]].all()


def test_state_is_saved_and_restored():
    model = nn.Sequential(lnpu.nn.Linear(4, 4), lnpu.nn.Linear(4, 4))
    step(model, gaussian(8, 4))
    state = lnpu.thresholds(model)
    other = nn.Sequential(lnpu.nn.Linear(4, 4), lnpu.nn.Linear(4, 4))
    lnpu.load_thresholds(other, state)
    assert torch.equal(other[0].emulation.thresholds, model[0].emulation.thresholds)
    assert not any("emulation" in key for key in model.state_dict())
    with pytest.raises(ConfigError, match="another model"):
        lnpu.load_thresholds(nn.Sequential(lnpu.nn.Linear(4, 4)), state)


def test_stochastic_rounding_repeats_under_manual_seed():
    layer = lnpu.nn.Linear(64, 64, precision=Precision(input=Rule(rounding="stochastic")))
    x, outputs = gaussian(8, 64), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(layer.eval()(x))
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


KNOBS = {
    "input": {"input": "fp8"},
    "weight": {"weight": "fp8"},
    "grad_output": {"grad_output": "fp8"},
    "forward input": {"forward": {"input": "fp8"}},
    "forward weight": {"forward": {"weight": "fp8"}},
    "grad_input error": {"grad_input": {"grad_output": "fp8"}},
    "grad_input weight": {"grad_input": {"weight": "fp8"}},
    "grad_weight input": {"grad_weight": {"input": "fp8"}},
    "grad_weight error": {"grad_weight": {"grad_output": "fp8"}},
    "accumulate": {"accumulate": "fp16"},
    "result": {"result": "e6m9"},
    "bound": {"input": {"max_error": 0.005}},
    "e5m2": {"input": {"low": "e5m2"}},
    "1-6-9": {"input": {"low": None, "high": "e6m9"}},
    "stochastic": {"input": {"rounding": "stochastic"}},
}
READERS = {
    "forward": {"input", "weight", "forward input", "forward weight", "accumulate", "result", "bound", "e5m2", "1-6-9"},
    "grad_input": {"weight", "grad_output", "grad_input error", "grad_input weight", "accumulate", "result"},
    "grad_weight": {"input", "grad_output", "grad_weight input", "grad_weight error", "accumulate", "result", "bound"},
}
READERS["grad_weight"] |= {"e5m2", "1-6-9", "stochastic"}
READERS["forward"] |= {"stochastic"}


@pytest.mark.parametrize("knob", KNOBS)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_every_knob_changes_the_steps_that_it_names_and_no_other(knob, kind):
    torch.manual_seed(0)
    layer, shape = (nn.Linear(200, 200), (96, 200)) if kind == "linear" else (nn.Conv2d(16, 8, 3), (4, 16, 9, 9))
    x, results = gaussian(*shape), []
    base = {"input": "fp16", "weight": "fp16", "grad_output": "fp16"}
    for settings in (base, base | KNOBS[knob]):
        lnpu.convert(layer, Precision.model_validate(settings))
        x.requires_grad_().grad = None
        layer.zero_grad()
        output = layer(x)
        output.backward(gaussian(*output.shape, seed=1))
        results.append({"forward": output.detach(), "grad_input": x.grad, "grad_weight": layer.weight.grad})
    changed = {name for name in results[0] if not torch.equal(results[0][name], results[1][name])}
    assert changed == {name for name, knobs in READERS.items() if knob in knobs}


def test_chunk_matters():
    torch.manual_seed(0)
    layer, x = nn.Linear(512, 8), gaussian(4, 512)
    outputs = [
        lnpu.convert(layer, Precision(input="fp16", accumulate="fp16", chunk=chunk))(x) for chunk in (1, 64, 512)
    ]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])
    expected = np.float16(0)
    products = lnpu.quantize(x[0], "fp16").detach().double() * layer.weight[0].detach().double()
    for value in products.tolist():
        expected = np.float16(np.float64(expected) + value)
    assert outputs[0][0, 0].item() == pytest.approx(float(expected) + layer.bias[0].item(), rel=2**-9, abs=2**-10)


def test_predictions_are_whole_numbers_that_cannot_overflow():
    """So that sums are equal in any order: the largest sum over a sample, and over the samples of 1,024 ranks."""
    for rule in (Rule(), Rule(low="e5m2"), Rule(high="e6m9")):
        for top in range(rule.threshold_range[0] // 4, rule.wide.max_exponent + 1):
            for elements, reach in ((SAMPLE, RANGE), (SAMPLE * 1024, 14)):
                error, signal = error_table(rule, torch.tensor(top - reach))
                seen = torch.arange(len(signal)) + rule.threshold_range[0] - 1 < 4 * (top + 1)
                assert max(error[:, seen].max().item(), signal[seen].max().item()) * elements < 2**63
                assert min(error.min(), signal.min()) >= 0 and (error <= signal)[:, seen & (signal > 0)].all()

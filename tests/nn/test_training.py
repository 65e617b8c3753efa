"""Emulated layers inside other people's training: compiled, autocast, frozen, nested counters, odd inputs."""

import contextlib

import pytest
import torch
from torch import nn

import lnpu_torch as lnpu
from lnpu_torch import ConfigError, Precision, Rule
from lnpu_torch.nn.sites import emulations

PRECISIONS = {
    "fgmp": "fgmp",
    "fp8": "fp8",
    "fp16": "fp16",
    "stochastic": Precision(input=Rule(rounding="stochastic"), grad_output="fgmp"),
}


def model(precision="fgmp"):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, groups=2), nn.ReLU()]
    return lnpu.convert(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 9, 4)), precision)


def batch(seed=0, **kwargs):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed), **kwargs)


def steps(cost):
    return {(entry.layer, entry.step): entry for entry in cost.counts.steps}


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS.keys())
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_compiled_is_eager(precision):
    torch.compiler.reset()
    eager, compiled = model(precision), model(precision)
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    with lnpu.CostCounter(eager) as a, lnpu.CostCounter(call) as b:
        for run in (eager, call):
            torch.manual_seed(1)
            for seed in range(3):
                run(batch(seed)).square().sum().backward()
    assert a.counts == b.counts
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for p, q in zip(emulations(eager).values(), emulations(compiled).values(), strict=True):
        assert torch.equal(p.emulation.thresholds, q.emulation.thresholds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_returns_its_dtype_and_rounds_the_float32_weights(dtype):
    layer = lnpu.nn.Linear(8, 8, precision=Precision(weight=Rule(threshold=-100)))
    layer.weight.data.fill_(1 + 2.0**-10)  # a binary16, no bfloat16
    x = torch.ones(1, 8)
    with torch.autocast("cpu", dtype):
        output = layer(x)
    assert output.dtype == dtype
    exact = 8 * (1 + 2.0**-10) + layer.bias
    assert torch.equal(output, exact.half().to(dtype)[None])
    output.sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("layer", [lnpu.nn.Linear(40, 8), lnpu.nn.Conv2d(3, 4, 3)], ids=["linear", "convolution"])
def test_backward_under_autocast_is_backward_without(layer):
    x = torch.randn(64, 40) if isinstance(layer, nn.Linear) else torch.randn(4, 3, 8, 8)
    grads = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = layer.eval()(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output.backward(torch.full_like(output, 1 / 3))
        grads.append(layer.weight.grad)
    assert torch.equal(*grads)


def test_half_precision_model():
    layer = lnpu.nn.Conv2d(3, 4, 3).half()
    x = batch().half().requires_grad_()
    layer(x).sum().backward()
    assert (x.grad.dtype, layer.weight.grad.dtype, layer.bias.grad.dtype) == (torch.float16,) * 3


def test_overflow_gives_infinity_for_the_grad_scaler():
    layer = lnpu.nn.Linear(1, 1, bias=False)
    layer(torch.full((1, 1), 100.0)).backward(torch.full((1, 1), 60000.0))
    assert layer.weight.grad.isinf().all()


def test_channels_last_counts_and_computes_alike():
    a, b = model(), model().to(memory_format=torch.channels_last)
    with lnpu.CostCounter(a) as x, lnpu.CostCounter(b) as y:
        outputs = a(batch()), b(batch().to(memory_format=torch.channels_last))
        for output in outputs:
            output.sum().backward()
    # sums in another order, then rounded to binary16, on values of order one
    torch.testing.assert_close(*outputs, rtol=2**-9, atol=2**-9)
    assert all(steps(x)[key].first == entry.first for key, entry in steps(y).items() if key[0] == "0")


@pytest.mark.parametrize("layer", [lnpu.nn.Linear(4, 4), lnpu.nn.Linear(4, 4, precision=Precision())])
def test_double_backward_says_so(layer):
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"double backward .* is not supported"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_what_nobody_asked_for_is_not_run():
    net = model()
    net[2].weight.requires_grad_(False)
    with lnpu.CostCounter(net) as cost:
        net(batch()).sum().backward()
    rows = steps(cost)
    for key in (("0", "grad_input"), ("2", "grad_weight")):
        assert rows[key].not_run == rows[key].macs > 0
    assert net[2].weight.grad is None and net[2].bias.grad is not None
    assert rows["0", "grad_weight"].not_run == 0


def test_without_gradients_only_forward_is_counted():
    net = model().eval()
    with lnpu.CostCounter(net) as cost, torch.no_grad():
        net(batch())
    assert {step for _, step in steps(cost)} == {"forward"}


def test_calls_are_counted_by_their_size():
    net = model()
    with lnpu.CostCounter(net) as cost:
        parts = []
        for seed, size in enumerate((4, 4, 3, 4)):  # batches, the third of them smaller
            net.zero_grad()
            with lnpu.CostCounter(net) as part:
                net(batch(seed)[:size]).sum().backward()
            parts.append(part.counts)
    rows = steps(cost)
    image, weight, result = 3 * 8 * 8, 8 * 3 * 9, 8 * 8 * 8
    calls = [(each.count, each.sizes) for each in rows["0", "forward"].by_size]
    assert calls == [(1, (3 * image, weight, 3 * result)), (3, (4 * image, weight, 4 * result))]
    assert rows["0", "grad_weight"].by_size[0].sizes == (3 * image, 3 * result, weight)
    assert rows["2", "grad_input"].by_size[1].sizes == (4 * 8 * 9, 8 * 4 * 9, 4 * result)
    assert rows["0", "grad_input"].by_size == ()  # nobody asked for it
    assert lnpu.Counts.merge(parts) == lnpu.Counts.merge(parts[::-1]) == cost.counts


def test_further_sizes_of_calls_are_counted_together():
    layer = lnpu.nn.Linear(6, 2)
    with torch.no_grad():
        for rows in range(1, 10):
            layer(torch.ones(rows, 6))
        with lnpu.CostCounter(layer) as cost:
            for rows in (3, 10, 20, 21):
                layer(torch.ones(rows, 6))
    calls = [(each.count, each.sizes) for each in steps(cost)["", "forward"].by_size]
    assert calls == [
        (1, (18, 12, 6)),
        (3, (17 * 6, 12, 17 * 2)),
    ]  # 8 sizes are told apart; 10, 20, 21 are 17 in the mean


def test_counters_nest_and_add_up():
    net = model()
    with lnpu.CostCounter(net) as outer:
        net(batch()).sum().backward()
        with lnpu.CostCounter(net) as inner:
            net(batch(1)).sum().backward()
        with lnpu.CostCounter(net) as other:
            net(batch(2)).sum()
    with lnpu.CostCounter(net) as first:
        pass
    assert first.counts.steps == ()
    assert {entry.calls for entry in steps(outer).values()} == {2, 3}
    rest = lnpu.Counts.merge([inner.counts, other.counts])
    assert steps(outer)["0", "forward"].macs == 3 * steps(inner)["0", "forward"].macs
    assert len(rest.steps) == len(outer.counts.steps)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_uncounted_steps_compute_as_ever_and_count_nothing(compiled):
    counted, sampled = model(), model()
    run = torch.compile(sampled, backend="aot_eager") if compiled else sampled
    with lnpu.CostCounter(sampled) as cost:
        for seed in range(3):
            counted(batch(seed)).sum().backward()
            with lnpu.no_count(sampled) if seed != 1 else contextlib.nullcontext():
                run(batch(seed)).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(counted.parameters(), sampled.parameters(), strict=True))
    states = lnpu.thresholds(sampled)
    assert all(torch.equal(state, states[name]) for name, state in lnpu.thresholds(counted).items())
    assert {(entry.calls, entry.macs > 0) for entry in steps(cost).values()} == {(1, True)}
    assert all(layer.emulation.counting for layer in emulations(sampled).values())


def test_empty_batch():
    for layer, shape in ((lnpu.nn.Linear(4, 2), (0, 4)), (lnpu.nn.Conv2d(3, 4, 3), (0, 3, 8, 8))):
        x = torch.empty(shape, requires_grad=True)
        with lnpu.CostCounter(layer) as cost:
            layer(x).sum().backward()
        assert layer.weight.grad.abs().sum() == 0 and x.grad.shape == x.shape
        assert all(entry.macs == 0 for entry in cost.counts.steps)


@pytest.mark.parametrize("stride", [1, 2])
def test_non_contiguous_input(stride):
    layer = lnpu.nn.Conv2d(3, 4, 3, stride=stride).eval()
    x = batch().transpose(2, 3)
    assert torch.equal(layer(x), layer(x.contiguous()))


def test_wrong_inputs_are_named():
    layer = lnpu.nn.Linear(4, 4)
    with pytest.raises(TypeError, match=r"input is torch\.float16 and weight torch\.float32"):
        layer(torch.ones(1, 4, dtype=torch.float16))
    with pytest.raises(TypeError, match=r"its input is torch\.int64"):
        layer(torch.ones(1, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected 3D"):
        lnpu.nn.Conv2d(3, 4, 3)(torch.ones(3, 3))


def test_what_is_no_precision_is_refused_and_a_rule_is_one():
    layer = lnpu.convert(nn.Linear(2, 2), Rule(low=None))
    assert layer.emulation.precision == lnpu.nn.Linear(2, 2, precision="fp16").emulation.precision
    with pytest.raises(ConfigError, match="a precision is a name"):
        lnpu.convert(nn.Linear(2, 2), 3)


def test_what_cannot_be_rounded_is_named():
    for x in (torch.ones(2, dtype=torch.int64), torch.ones(2, dtype=torch.complex64), [1.0]):
        with pytest.raises(TypeError, match="floats can be rounded"):
            lnpu.quantize(x)
    with pytest.raises(TypeError, match="a threshold is an integer"):
        lnpu.quantize(torch.ones(2), threshold=1.5)
    with pytest.raises(ValueError, match="without FP8 has no threshold"):
        lnpu.quantize(torch.ones(2), "fp16", threshold=1)


def test_counting_a_float_model_says_what_to_do():
    with pytest.raises(ConfigError, match=r"lnpu_torch\.convert"), lnpu.CostCounter(nn.Linear(1, 1)):
        pass


def test_fp8_zeros_made_by_rounding_are_skipped():
    """Zeros that no ReLU made: below half the smallest FP8 code of the window."""
    layer = lnpu.nn.Linear(4, 4, precision=Precision(input=Rule(threshold=40)))
    with lnpu.CostCounter(layer) as cost:
        layer(torch.tensor([[2.0**-12, 300.0, 1.0, -(2.0**-12)]]))
    row = cost.report("lnpu").rows[0]
    assert (row.executed, row.skipped) == (8, 8)


def test_precision_from_yaml(tmp_path):
    path = tmp_path / "precision.yaml"
    path.write_text("input: fgmp\nweight: {low: e5m2, fp16_share: 0.1}\ngrad_weight: {input: null}\nchunk: 32\n")
    layer = lnpu.convert(nn.Linear(2, 2), path)
    chosen = layer.emulation.precision
    assert chosen.rule("forward", "weight") == Rule(low="e5m2", fp16_share=0.1)
    assert chosen.rule("grad_weight", "input") is None and chosen.rule("forward", "input") == Rule()
    for text, message in {
        "inputs: fgmp": "unknown key 'inputs'.*nearest: input",
        "chunk: 0": "chunk: .*greater than or equal to 1, got 0",
        "input: {max_error: much}": "input.max_error: .*valid number",
        "input: fgpm": "unknown rule 'fgpm'",
        "input: {max_error: 0.1, threshold: 3}": "give one of",
        "weight: {low: null, high: null}": "needs low, high or both",
        "input: fp8\ninput: fp8": "'input' stands twice",
        "input: [": "not valid YAML",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            lnpu.convert(nn.Linear(2, 2), path)


@pytest.mark.parametrize("first", [False, True])
def test_each_pass_is_counted_if_its_own_block_counts(first):
    layer, x = lnpu.nn.Linear(6, 5), torch.randn(3, 6).requires_grad_()
    blocks = (
        (contextlib.nullcontext(), lnpu.no_count(layer)) if first else (lnpu.no_count(layer), contextlib.nullcontext())
    )
    with lnpu.CostCounter(layer) as cost:
        with blocks[0]:
            out = layer(x)
        with blocks[1]:
            out.sum().backward()
    calls = {entry.step for entry in cost.counts.steps}
    assert ("forward" in calls, "grad_input" in calls) == (first, not first)

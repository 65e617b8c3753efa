"""convert, revert and coverage: identity, sharing, patterns, and what stays in float and why."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lnpu_torch as lnpu
from lnpu_torch import ConfigError, Precision

torchvision = pytest.importorskip("lnpu_torch.recipes.torchvision_compat").import_torchvision()


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def slots(cost):
    return sum(entry.slots - entry.not_run for entry in cost.counts.steps)


@pytest.mark.parametrize("name", ["resnet18", "vgg16", "alexnet", "mobilenet_v2"])
def test_zoo_models_convert_train_and_revert_bit_identical(name):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attributes = {key: set(vars(module)) for key, module in model.named_modules()}
    classes = {key: type(module) for key, module in model.named_modules()}
    parameters = list(model.parameters())

    assert lnpu.convert(model, "fgmp") is model
    assert all(row.emulated or "not multiply-accumulate" in row.reason for row in lnpu.coverage(model).rows)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == list(before)
    assert isinstance(next(m for m in model.modules() if isinstance(m, lnpu.nn.Conv2d)), nn.Conv2d)

    with FlopCounterMode(display=False) as flops, lnpu.CostCounter(model) as cost:
        output = model.eval()(torch.randn(1, 3, 64, 64))
        assert 2 * slots(cost) == flops.get_total_flops()
        output.sum().backward()
    if name != "mobilenet_v2":  # torch's counter takes a depthwise convolution's grad_weight for a dense one's
        assert 2 * slots(cost) == flops.get_total_flops()
    first = next(row for row in cost.report("lnpu").rows if row.step == "grad_input")
    assert first.not_run == first.slots > 0

    assert lnpu.revert(model) is model
    assert classes == {key: type(module) for key, module in model.named_modules()}
    assert attributes == {key: set(vars(module)) for key, module in model.named_modules()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_optimizer_hooks_and_checkpoints_from_either_side_still_fit():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    float_state = copy.deepcopy(model.state_dict())
    lnpu.convert(model, "fgmp")
    model.load_state_dict(float_state)
    weight = model[0].weight.clone()
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert calls == ["hook"] and not torch.equal(weight, model[0].weight)
    fresh = small_model()
    fresh.load_state_dict(model.state_dict())


def test_shared_modules_stay_shared():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    lnpu.convert(model, "fgmp")
    assert model["a"] is model["b"] is shared
    with lnpu.CostCounter(model) as cost:
        model["b"](model["a"](torch.randn(2, 4)))
    (entry,) = cost.counts.steps
    assert (entry.layer, entry.calls, entry.slots) == ("a", 2, 2 * 2 * 16)


def test_a_bare_layer_converts_in_place():
    layer = nn.Linear(4, 4)
    assert type(lnpu.convert(layer, "fp8")) is lnpu.nn.Linear
    assert type(lnpu.revert(layer)) is nn.Linear and "emulation" not in vars(layer)


def test_overrides():
    model = lnpu.convert(small_model(), "fgmp", overrides={"*": "fp16", "5": None, "0": Precision(input="fp8")})
    assert type(model[5]) is nn.Linear
    assert model[0].emulation.precision == Precision(input="fp8")
    lnpu.convert(model, None, overrides={"5": "fp8"})
    assert type(model[0]) is nn.Conv2d and model[5].emulation.precision.rule("forward", "input").high is None


def test_a_pattern_that_matches_nothing_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'layer1.0.conv' matches no layer.*nearest: layer1.0.conv"):
        lnpu.convert(torchvision.models.resnet18(), "fgmp", overrides={"layer1.0.conv": None})


def test_a_failed_convert_changes_nothing():
    model = small_model()
    with pytest.raises(ConfigError, match="unknown precision 'fp9'"):
        lnpu.convert(model, "fgmp", overrides={"5": "fp9"})
    assert type(model[0]) is nn.Conv2d


class Own(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) * 2


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3))


def test_coverage_says_what_stayed_in_float_and_why():
    model = nn.ModuleDict(
        {
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
            "lazy": nn.LazyLinear(4),
            "attention": nn.MultiheadAttention(4, 2),
            "own": Own(1, 1, 1),
            "lstm": nn.LSTM(4, 4),
            "norm": nn.LayerNorm(4),
            "left": nn.Linear(4, 4),
            "bare": Bare(),
            "done": nn.Linear(4, 4),
        }
    )
    coverage = lnpu.coverage(lnpu.convert(model, "fgmp", overrides={"left": None}))
    reasons = {row.layer: row.reason for row in coverage.in_float}
    expected = {
        "parametrized": "parametrized",
        "lazy": "lazy",
        "attention": "functional",
        "attention.out_proj": "functional",
        "own": "subclass of Conv2d",
        "lstm": "no emulated layer",
        "norm": "element operations",
        "left": "by choice",
        "bare": "not a layer of torch's",
    }
    assert reasons.keys() == expected.keys()
    assert all(text in reasons[name] for name, text in expected.items())
    assert [row.layer for row in coverage.emulated] == ["done"]
    assert "lstm" in str(coverage) and "1 of 10 layers emulated" in str(coverage)


def test_deepcopy_pickle_and_torch_save():
    model = lnpu.convert(small_model(), "fgmp")
    x = torch.randn(4, 3, 8, 8)
    model(x).sum().backward()
    model.eval()
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), expected)
        assert other[0].emulation.counters.data_ptr() != model[0].emulation.counters.data_ptr()
    model.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))


def test_moving_and_casting_the_model_keeps_the_emulation():
    model = lnpu.convert(nn.Sequential(nn.Linear(4, 4)), "fgmp")
    model(torch.randn(2, 4)).sum().backward()
    counters = model[0].emulation.counters.clone()
    model.to(torch.float64)
    assert model[0].emulation.counters.dtype == torch.int64 and torch.equal(model[0].emulation.counters, counters)
    assert model(torch.randn(2, 4, dtype=torch.float64)).dtype == torch.float64
    assert model.to("meta")[0].emulation.counters.device.type == "meta"


def test_second_derivatives_of_a_part_left_in_float_are_torchs():
    critic = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.MaxPool1d(2), nn.Linear(4, 1))
    expected, x = copy.deepcopy(critic), torch.randn(4, 8)
    model = lnpu.convert(nn.ModuleDict({"g": nn.Linear(8, 8), "d": critic}), overrides={"d.*": None})
    penalties = []
    for net in (expected, model["d"]):
        inputs = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(net(inputs).sum(), inputs, create_graph=True)
        grad.norm().backward()
        penalties.append(net[0].weight.grad)
    assert torch.equal(*penalties) and penalties[0].any()


def test_convert_touches_only_what_it_emulates():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(2), nn.Flatten())
    before = [type(module) for module in model]
    lnpu.convert(model)
    assert [type(module) for module in model][1:] == before[1:] and type(model[0]) is lnpu.nn.Conv2d


def test_coverage_warns_of_torchs_fast_path():
    encoder = lnpu.convert(nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), "fp8").eval()
    assert "set_fastpath_enabled(False)" in str(lnpu.coverage(encoder))
    x, enabled = torch.randn(2, 5, 8), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with lnpu.CostCounter(encoder) as cost, torch.no_grad():
            encoder(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert {entry.layer for entry in cost.counts.steps} == {"linear1", "linear2"}

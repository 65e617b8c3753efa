"""convert, revert and coverage: identity, sharing, patterns, and what stays in float and why."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

import lnpu_torch as lnpu
from lnpu_torch import ConfigError, Precision
from lnpu_torch.nn import coverage as float_products
from lnpu_torch.nn.convert import FloatProduct

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


def macs(cost):
    return sum(entry.macs - entry.not_run for entry in cost.counts.steps)


@pytest.mark.parametrize("name", ["resnet18", "alexnet", "mobilenet_v2"])
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
        assert 2 * macs(cost) == flops.get_total_flops()
        output.sum().backward()
    if name != "mobilenet_v2":  # torch's counter takes a depthwise convolution's grad_weight for a dense one's
        assert 2 * macs(cost) == flops.get_total_flops()
    first = next(row for row in cost.report("lnpu").rows if row.step == "grad_input")
    assert first.not_run == first.macs > 0

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
    assert (entry.layer, entry.calls, entry.macs) == ("a", 2, 2 * 2 * 16)


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
        "lazy": "lazy",
        "own": "made no product yet",
        "norm": "element operations",
        "left": "by choice",
        "bare": "made no product yet",
    }
    assert reasons.keys() == expected.keys()
    assert all(text in reasons[name] for name, text in expected.items())
    assert [row.layer for row in coverage.emulated] == ["attention", "attention.out_proj", "lstm", "done"]
    assert "bare" in str(coverage) and "4 of 9 layers emulated" in str(coverage)
    layers = lnpu.coverage(lnpu.convert(model, only=(nn.Linear,), overrides={"left": None}))
    reasons = {row.layer: row.reason for row in layers.in_float}
    assert "functional" in reasons["attention.out_proj"] and {row.layer for row in layers.emulated} == {"done"}


def test_deepcopy_pickle_and_torch_save():
    model = lnpu.convert(small_model(), "fgmp")
    x = torch.randn(4, 3, 8, 8)
    model(x).sum().backward()
    model.eval()
    expected = model(x)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    with pytest.warns(UserWarning, match="pickled whole"):
        pickled = pickle.dumps(model)
    for other in (copy.deepcopy(model), pickle.loads(pickled)):
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
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    lnpu.convert(encoder, "fp8", only=(nn.Linear,))
    assert "set_fastpath_enabled(False)" in str(lnpu.coverage(encoder))
    x, enabled = torch.randn(2, 5, 8), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with lnpu.CostCounter(encoder) as cost, torch.no_grad():
            encoder(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert {entry.layer for entry in cost.counts.steps} == {"linear1", "linear2"}


@pytest.mark.parametrize("way", ["to_empty", "assign"])
def test_a_model_made_without_memory_begins_like_any_other(way):
    expected = small_model()
    with torch.device("meta"):
        model = lnpu.convert(small_model(), "fgmp")
    x = torch.randn(4, 3, 8, 8)
    assert model(x.to("meta")).shape == expected(x).shape
    torch.use_deterministic_algorithms(True)  # torch then fills new memory with what is no threshold
    try:
        if way == "to_empty":
            model.to_empty(device="cpu")
        model.load_state_dict(expected.state_dict(), assign=way == "assign")
    finally:
        torch.use_deterministic_algorithms(False)
    lnpu.convert(expected, "fgmp")
    with lnpu.CostCounter(model) as ours:
        found = model(x)
    with lnpu.CostCounter(expected) as theirs:
        assert torch.equal(expected(x), found)
    assert ours.counts.steps == theirs.counts.steps


class Padded(nn.Conv2d):
    def __init__(self, channels, width):
        super().__init__(channels, width, 3, padding=1)


class Extended(Padded):
    def extra_repr(self):
        return "extended"


def test_a_subclass_that_keeps_the_forward_is_emulated():
    torch.manual_seed(0)
    model, x = nn.Sequential(Padded(3, 4), Extended(4, 2)), torch.randn(2, 3, 6, 6)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1))
    plain.load_state_dict(model.state_dict())
    lnpu.convert(plain, "fgmp")
    assert not lnpu.coverage(lnpu.convert(model, "fgmp")).in_float
    with lnpu.CostCounter(model) as ours, lnpu.CostCounter(plain) as theirs:
        assert torch.equal(expected := model(x), plain(x))
    assert ours.counts.steps == theirs.counts.steps
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert isinstance(model[1], Extended) and "extended" in repr(model[1])
    with pytest.warns(UserWarning, match="pickled whole"):
        assert type(pickle.loads(pickle.dumps(model))[1]) is type(model[1])
    assert [type(layer) for layer in lnpu.revert(model)] == [Padded, Extended]


@pytest.mark.parametrize("register", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("when", ["before", "after"])
def test_parametrized_layers_are_emulated_whenever_they_became_so(register, when):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    if when == "before":
        lnpu.convert(register(model[0])) and model
    else:
        register(lnpu.convert(model)[0])
    assert not lnpu.coverage(model).in_float
    assert {product.op for product in lnpu.coverage(model, x).products} <= {"aten.mv", "aten.vdot"}  # spectral_norm's
    step = copy.deepcopy(model).eval()
    weight = step[0].weight.detach()
    plain = nn.Linear(8, 8)
    plain.load_state_dict({"weight": weight, "bias": step[0].bias})
    assert torch.equal(step(x), lnpu.convert(plain)(x))
    model(x).sum().backward()
    assert all(parameter.grad.any() for parameter in model.parameters())
    lnpu.convert(model, "fp8")(x)
    float_layer = lnpu.revert(model)[0]
    assert isinstance(float_layer, nn.Linear) and not isinstance(float_layer, lnpu.nn.EmulatedModule)
    assert parametrize.is_parametrized(float_layer)
    parametrize.remove_parametrizations(float_layer, "weight")
    assert type(float_layer) is nn.Linear


def test_a_parametrized_layer_is_not_pickled():
    model = nn.Sequential(parametrizations.weight_norm(lnpu.nn.Linear(8, 8)))
    with pytest.raises(RuntimeError, match="parametrized modules"):
        pickle.dumps(model)


def test_a_layer_whose_forward_was_replaced_is_left_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].forward = lambda x: x
    assert [row.reason for row in lnpu.coverage(lnpu.convert(model)).in_float] == [
        "its forward was replaced: convert before that"
    ]


def test_emulation_looks_at_a_computed_weight_once_a_forward():
    layer = parametrizations.spectral_norm(nn.Linear(8, 8))
    twin, x = copy.deepcopy(layer), torch.randn(4, 8)
    lnpu.convert(layer)
    for each in (layer, twin):
        each(x)
    ours, theirs = (each.parametrizations.weight[0]._u for each in (layer, twin))
    assert torch.equal(ours, theirs)  # a step of power iteration each


def test_coverage_of_a_pruned_model():
    model = nn.Sequential(nn.Linear(8, 8))
    prune.l1_unstructured(model[0], "weight", 0.5)
    assert lnpu.coverage(lnpu.convert(model), torch.randn(4, 8)).products == ()
    assert lnpu.coverage(model, input=torch.randn(4, 8)).macs == 256


class Recurrent(nn.Module):
    def __init__(self, make, **settings):
        super().__init__()
        self.recurrent = make(28, 64, batch_first=True, **settings)
        self.head = nn.LazyLinear(10)

    def forward(self, x):
        return self.head(self.recurrent(x)[0][:, -1])


@pytest.mark.parametrize("settings", [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize(("make", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_are_seen_in_float(make, gates, settings):
    model, x = Recurrent(make, **settings), torch.randn(4, 10, 28)
    model(x)
    both, layers = (2, 2) if settings.get("bidirectional") else (1, 1)
    inner = sum(64 * gates * ((28 if layer == 0 else 64 * both) + 64) * both for layer in range(layers))
    coverage = lnpu.coverage(lnpu.convert(model, only=(nn.Linear,)), x)
    assert sum(product.macs for product in coverage.products) == 4 * 10 * inner
    assert coverage.macs == 4 * 10 * inner + 4 * 10 * 64 * both
    with lnpu.CostCounter(model) as cost:
        model(x.requires_grad_()).sum().backward()
    assert cost.report().float_macs == pytest.approx(3 * 4 * 10 * inner, rel=0.1)  # the first step has no state yet
    assert lnpu.coverage(lnpu.convert(model), x).products == ()


class Bilinear(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 8))
        self.bilinear = nn.Bilinear(8, 8, 4)

    def forward(self, x):
        return self.bilinear(self[0](x), x)


def test_ops_with_weights_and_no_formula_are_named(monkeypatch):
    monkeypatch.delitem(float_products.OWN, "_trilinear")
    model = Bilinear()
    coverage = lnpu.coverage(lnpu.convert(model, only=(nn.Linear,)), torch.randn(4, 8))
    assert coverage.products == (FloatProduct("bilinear", "aten._trilinear", None),)
    assert "at least 0.0%" in str(coverage) and "an unknown number" in str(coverage)
    monkeypatch.undo()
    assert lnpu.coverage(model, torch.randn(4, 8)).products[0].macs == 4 * 4 * 8 * 8


def test_coverage_looks_into_wrappers():
    model, x = lnpu.convert(nn.Sequential(nn.Linear(8, 8))), torch.randn(4, 8)
    for wrapped in (torch.compile(model, backend="eager"), nn.Sequential(torch.compile(model, backend="eager"))):
        assert lnpu.coverage(wrapped, x).products == ()
    parallel = nn.DataParallel(model)
    assert lnpu.coverage(parallel, x).products == () and lnpu.thresholds(parallel).keys() == {"0"}
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        model[0]._replicate_for_data_parallel()  # as DataParallel does with several GPUs


def test_layers_that_came_later_are_not_called_a_choice():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(4, 4))
    assert {row.reason for row in lnpu.coverage(model).rows} == {"not converted"}
    lnpu.convert(model, overrides={"2": None})
    model[1] = nn.Linear(8, 4)
    reasons = [row.reason for row in lnpu.coverage(model).rows]
    assert reasons[1].startswith("added since") and reasons[2] == "left in float by choice"
    thresholds = model[0].emulation.thresholds
    lnpu.convert(model, only_new=True)
    assert [row.emulated for row in lnpu.coverage(model).rows] == [True, True, False]
    assert model[0].emulation.thresholds is thresholds


def test_a_model_of_which_nothing_can_be_converted_is_told_of_at_once():
    model = nn.Sequential(nn.LayerNorm(4), nn.Embedding(4, 4), nn.LayerNorm(4))
    with pytest.warns(UserWarning, match=r"no layer .* was converted: LayerNorm: element op.*\(2 x\); Embedding"):
        lnpu.convert(model)
    with (
        pytest.raises(ConfigError, match="no layer of this model is emulated: LayerNorm: element operations"),
        lnpu.CostCounter(model),
    ):
        pass
    with pytest.raises(ConfigError, match=r"call lnpu_torch\.convert"), lnpu.CostCounter(nn.Linear(2, 2)):
        pass


def test_a_weight_may_be_a_buffer_or_an_attribute():
    x = torch.randn(4, 8)
    for place in ("register_buffer", "__setattr__"):
        layer = nn.Linear(8, 8, bias=False)
        weight, expected = layer.weight.detach(), lnpu.convert(copy.deepcopy(layer))(x)
        del layer.weight
        getattr(layer, place)("weight", weight)
        assert torch.equal(lnpu.convert(layer)(x), expected)


class Foreign(Tensor):
    """A tensor of somebody else's making."""


Foreign.__module__ = "elsewhere"


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_weights_that_the_emulation_cannot_read_are_said_so():
    layer, other = nn.Linear(8, 8), nn.Linear(8, 8)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Foreign))
    model = lnpu.convert(nn.Sequential(layer, other))
    assert not isinstance(model[0], lnpu.nn.EmulatedModule)
    assert "its weight is a Foreign" in lnpu.coverage(model).in_float[0].reason
    other.weight = nn.Parameter(other.weight.detach().to_sparse_csr())
    with pytest.raises(TypeError, match="strided"):
        model(torch.randn(4, 8))


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_those_who_trace_a_model_get_it_in_float(monkeypatch):
    layers = [nn.Linear(8, 8), nn.ReLU(), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2), nn.ConvTranspose1d(3, 2, 2)]
    model, x = lnpu.convert(nn.Sequential(*layers)), torch.randn(4, 8)
    expected = lnpu.revert(copy.deepcopy(model))(x)
    assert torch.equal(torch.jit.trace(model, x, check_trace=False)(x), expected)
    with monkeypatch.context() as patch:  # as torch.onnx.export does
        patch.setattr("torch.onnx._internal.exporter._flags._is_onnx_exporting", True)
        assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    with pytest.raises(RuntimeError, match="revert it first"):
        torch.jit.script(model)
    assert isinstance(model[0], lnpu.nn.EmulatedModule)


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_transforms_are_refused_by_name():
    model, x = lnpu.convert(nn.Sequential(nn.Linear(8, 8))), torch.randn(4, 8)
    calls = [
        lambda: torch.func.vmap(model)(x),
        lambda: torch.func.grad(lambda x: model(x).sum())(x),
        lambda: torch.func.jvp(model, (x,), (x,)),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"lnpu_torch\.revert"):
            call()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"lnpu_torch\.revert"):
        model(forward_ad.make_dual(x, x))

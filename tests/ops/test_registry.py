"""A layer pass is one op to compilers and to tensors without values; other modes see the products inside."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import lnpu_torch as lnpu
from helpers.float_twin import Call
from helpers.tensors import scalar
from lnpu_torch.nn.gemms import Convolution, Linear, product_of
from lnpu_torch.ops import registry
from lnpu_torch.quant.precision import Rule

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "convolution": (lambda: nn.Conv2d(4, 6, 3, stride=(2, 1), padding=1, groups=2), (3, 4, 9, 8)),
    "without a bias": (lambda: nn.Conv2d(4, 6, 1, bias=False), (3, 4, 5, 5)),
    "margin": (lambda: nn.Conv2d(4, 6, (4, 3), padding="same"), (3, 4, 9, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
    "3d": (lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    "1d": (lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "activations": (lambda: Call(lambda x: x @ (2 * x.mT).contiguous()), (3, 4, 6)),
    "activations, turned": (lambda: Call(lambda x: x @ (2 * x).mT), (3, 4, 6)),
}
PRECISIONS = {
    "fgmp": "fgmp",
    "stochastic": lnpu.Precision(input=Rule(rounding="stochastic"), grad_output="fp8"),
    "in float": lnpu.Precision(),
    "partly": lnpu.Precision(weight="fp8", grad_weight={"input": None}),
}


class Seen(TorchDispatchMode):
    """Notes the ops that torch's dispatcher is asked for."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append((func, args))
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    """Whose ops may mean something else."""


def calls_of(layer, x):
    """The ops of a step, and their arguments, of a layer that runs as if its tensors had no values."""
    was, registry.is_plain = registry.is_plain, lambda _: False
    try:
        with Seen() as seen:
            layer(x).sum().backward()
    finally:
        registry.is_plain = was
    return [(op, args) for op, args in seen.ops if op.namespace == registry.NAMESPACE]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=PRECISIONS.keys())
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_opcheck(make, shape, precision, last):
    if last and len(shape) != 4:
        pytest.skip("has no channels_last")
    form = torch.channels_last if last else torch.contiguous_format
    layer = lnpu.convert(make(), precision).to(memory_format=form)
    x = torch.randn(shape).to(memory_format=form).requires_grad_()
    calls = calls_of(layer, x)
    names = [op.name().split("::")[1] for op, _ in calls if "seed" not in op.name()]
    assert names == ["layer_forward", "layer_backward"]
    for op, args in calls:
        detached = [each.detach() if isinstance(each, torch.Tensor) else each for each in args]
        torch.library.opcheck(op, detached, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_opcheck_of_quantize():
    x, text = torch.randn(4, 6, 5, 3), Rule().model_dump_json()
    stochastic = Rule(rounding="stochastic").model_dump_json()
    for arguments in ((x, scalar(1), None, text, 0, True), (x, scalar(1), torch.tensor(3), stochastic, 1, False)):
        torch.library.opcheck(torch.ops.lnpu.quantize.default, arguments)
    torch.library.opcheck(torch.ops.lnpu.own_threshold.default, (x, text))


@pytest.mark.parametrize("precision", ["fgmp", PRECISIONS["partly"]])
@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_one_op_computes_and_counts_as_the_direct_way_does(make, shape, precision):
    found = []
    for opaque in (False, True):
        torch.manual_seed(0)
        layer, x = lnpu.convert(make(), precision), torch.randn(shape).requires_grad_()
        with lnpu.CostCounter(layer) as cost:
            if opaque:
                calls_of(layer, x)
            else:
                layer(x).sum().backward()
        found.append(
            (
                [x.grad, *(p.grad for p in layer.parameters())],
                next(iter(lnpu.thresholds(layer).values())),
                cost.counts.steps,
            )
        )
    (direct, thresholds, steps), (grads, others, counted) = found
    assert all(torch.equal(a, b) for a, b in zip(direct, grads, strict=True))
    assert torch.equal(thresholds, others) and steps == counted


@pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_flops_of_a_layer_pass_are_its_macs(make, shape):
    layer, x = lnpu.convert(make()), torch.randn(shape).requires_grad_()
    with lnpu.CostCounter(layer) as cost:
        layer(x).sum().backward()
    macs = sum(entry.macs for entry in cost.counts.steps)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, FlopCounterMode(display=False) as flops:
        fake = mode.from_tensor(x.detach()).requires_grad_()
        layer(fake).sum().backward()
    assert flops.get_total_flops() == 2 * macs


def test_other_modes_see_the_products_inside():
    layer, x = lnpu.convert(nn.Linear(6, 5)), torch.randn(3, 6)
    with Seen() as seen:
        layer(x)
    names = {op.name() for op, _ in seen.ops}
    assert "aten::addmm" in names and not any(name.startswith("lnpu::") for name in names)


def test_which_tensors_are_plain():
    assert registry.is_plain([torch.nn.Parameter(torch.ones(3)), None])
    for foreign in (torch.ones(3).as_subclass(Subclass), torch.ones(3, device="meta")):
        assert not registry.is_plain([torch.ones(3), foreign])


def test_a_product_is_packed_and_unpacked():
    grid = Convolution((2, 1), (1, 0), (1, 3), 2, True, (1, 0), (0, 1))
    for each in (Linear(), grid, Convolution((), (), (), 1, False, (), ())):
        assert product_of(each.pack()) == each

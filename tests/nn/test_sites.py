"""Products that a module's own forward calls: as torch's with all operands in float, counted, and their state."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lnpu_torch as lnpu
from helpers.float_twin import Call, check_float_twin
from helpers.processes import on_ranks
from lnpu_torch import ConfigError
from lnpu_torch.nn.sites import emulations
from lnpu_torch.ops import dispatch
from lnpu_torch.quant.precision import Precision, Rule


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape)))


W = normal
ENDS = torch.tensor([2, 2, 5], dtype=torch.int32)
WITH_WEIGHTS: dict[str, tuple[Callable[..., Any], list[Tensor], list[Tensor]]] = {
    "linear": (F.linear, [normal(2, 5, 4)], [W(3, 4), W(3)]),
    "linear of a vector of weights": (F.linear, [normal(5, 4)], [W(4)]),
    "matmul": (lambda x, w: x @ w, [normal(2, 5, 4)], [W(4, 3)]),
    "matmul of a view": (lambda x, w: x @ w.T, [normal(2, 5, 4)], [W(3, 4)]),
    "matmul, weight first": (lambda x, w: (w @ x).view(-1), [normal(2, 5, 4)], [W(3, 5)]),
    "matmul, weight first, of a vector": (lambda x, w: w @ x, [normal(5)], [W(3, 5)]),
    "matmul, a vector of weights": (lambda x, w: x @ w, [normal(2, 5, 4)], [W(4)]),
    "matmul, a vector of weights first": (lambda x, w: w @ x, [normal(2, 5, 4)], [W(5)]),
    "bmm, weight of each entry": (torch.bmm, [normal(2, 5, 4)], [W(2, 4, 3)]),
    "matmul, weights of each entry first": (lambda x, w: w @ x, [normal(2, 5, 4)], [W(2, 3, 5)]),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w), [normal(5, 4)], [W(4, 3), W(3)]),
    "conv1d": (lambda x, w: F.conv1d(x, w, padding="same"), [normal(2, 2, 7)], [W(4, 2, 3)]),
    "conv2d": (
        lambda x, w, b: F.conv2d(x, w, b, stride=2, padding=1, groups=2),
        [normal(2, 2, 7, 7)],
        [W(4, 1, 3, 3), W(4)],
    ),
    "conv2d, sizes for all": (
        lambda x, w: F.conv2d(x, w, stride=[2], padding=[1]),
        [normal(2, 2, 7, 7)],
        [W(4, 2, 3, 3)],
    ),
    "conv3d": (F.conv3d, [normal(1, 2, 4, 4, 3)], [W(3, 2, 2, 3, 1)]),
    "conv_transpose1d": (lambda x, w: F.conv_transpose1d(x, w, None, [2], [1]), [normal(2, 4, 5)], [W(4, 3, 3)]),
    "conv_transpose2d": (
        lambda x, w: F.conv_transpose2d(x, w, stride=2, output_padding=1, groups=2),
        [normal(2, 4, 5, 5)],
        [W(4, 3, 3, 3)],
    ),
    "bilinear": (F.bilinear, [normal(6, 3), normal(6, 4)], [W(5, 3, 4), W(5)]),
    "einsum": (lambda x, w: torch.einsum("bhld,hdo->blo", x, w), [normal(2, 3, 5, 4)], [W(3, 4, 6)]),
    "tensordot": (lambda x, w: torch.tensordot(x, w, 2), [normal(2, 3, 4)], [W(3, 4, 5)]),
    "inner": (torch.inner, [normal(2, 3, 4)], [W(5, 4)]),
    "addbmm": (lambda x, w: torch.addbmm(x[0, :, :1], x, w, beta=0.5), [normal(2, 5, 4)], [W(2, 4, 3)]),
    "groups of rows": (lambda x, w: F.grouped_mm(x, w.mT, offs=ENDS), [normal(5, 8)], [W(3, 16, 8)]),
}


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_products_with_weights_are_torchs(name: str) -> None:
    function, inputs, weights = WITH_WEIGHTS[name]
    if name == "linear of a vector of weights":
        check_float_twin(Call(function, *weights), *inputs, sites=0)
    else:
        names = check_float_twin(Call(function, *weights), *inputs)
        assert len(names) == (2 if name == "bilinear" else 1) and all(each.startswith(":") for each in names)


@pytest.mark.parametrize(
    "shapes",
    [
        *(((4,), (4,)), ((3, 4), (4,)), ((4,), (4, 3)), ((2, 3, 4), (4,)), ((4,), (2, 4, 3)), ((2, 3, 4), (4, 5))),
        *(((3, 4), (2, 4, 5)), ((2, 1, 3, 4), (5, 4, 2)), ((2, 3, 4), (2, 4, 5)), ((0, 4), (4, 5)), ((3, 0), (0, 5))),
    ],
    ids=str,
)
def test_matmul_of_any_ranks(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    check_float_twin(Call(torch.matmul), *(normal(*shape) for shape in shapes), sites=1)


MATRICES = (normal(3, 4), normal(4, 5))
ENTRIES = (normal(2, 3, 4), normal(2, 4, 5))
CALLS: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "@": (lambda a, b: a @ b, ENTRIES),
    "__rmatmul__": (lambda a, b: b.__rmatmul__(a), MATRICES),
    "linalg": (torch.linalg.matmul, ENTRIES),
    "turned": (lambda a, b: a @ b.mT.contiguous().mT, ENTRIES),
    "mm by name": (lambda a, b: torch.mm(a, mat2=b), MATRICES),
    "method": (lambda a, b: a.mm(b), MATRICES),
    "bmm": (lambda a, b: torch.bmm(input=a, mat2=b), ENTRIES),
    "mv": (lambda a, b: torch.mv(a, vec=b[:, 0]), MATRICES),
    "addmm": (lambda a, b: torch.addmm(a.sum(), mat1=a, mat2=b, beta=0.5, alpha=2), MATRICES),
    "baddbmm": (lambda a, b: torch.baddbmm(a.sum(), batch1=a, batch2=b), ENTRIES),
    "addmv": (lambda a, b: torch.addmv(a[:, 0], a, b[:, 0]), MATRICES),
    "addmm of beta 0": (lambda a, b: torch.addmm(a.sum() + torch.nan, a, b, beta=0), MATRICES),
    "addmm_": (lambda a, b: (a[:, :1] * 2).expand(3, 5).clone().addmm_(a, b, beta=0.5), MATRICES),
    "baddbmm_": (lambda a, b: torch.ones(2, 3, 5).baddbmm_(batch1=a, batch2=b, alpha=2), ENTRIES),
    "addbmm": (lambda a, b: torch.ones(3, 5).addbmm(a, b), ENTRIES),
    "addbmm_": (lambda a, b: torch.ones(3, 5).addbmm_(a, b), ENTRIES),
    "addmv_": (lambda a, b: torch.ones(3).addmv_(a, b[:, 0]), MATRICES),
    "dot": (lambda a, b: torch.dot(a[0], tensor=b[:, 0]), MATRICES),
    "inner": (lambda a, b: a.inner(b.mT), MATRICES),
    "groups of entries": (lambda a, b: F.grouped_mm(a, b), (normal(2, 3, 8), normal(2, 8, 4).mT.contiguous().mT)),
    "groups of columns": (lambda a, b: F.grouped_mm(a, b, offs=ENDS * 8 // 5), (normal(3, 4, 8), normal(8, 8))),
    "groups of sums": (lambda a, b: F.grouped_mm(a.mT, b, offs=ENDS), (normal(5, 4), normal(5, 8))),
    "einsum of sublists": (lambda a, b: torch.einsum(a, [0, 1], b, [1, 2], [0, 2]), MATRICES),
    "changed in place": (lambda a, b: (a @ b).add_(1) + torch.einsum("bij,bjk->bik", a, b).mul_(2), ENTRIES),
    "linear of activations": (lambda a, b: F.linear(a, b.T), MATRICES),
}


@pytest.mark.parametrize("name", CALLS)
def test_products_of_activations_are_torchs(name: str) -> None:
    function, inputs = CALLS[name]
    check_float_twin(Call(function), *inputs, sites=2 if name == "changed in place" else 1)


EQUATIONS: dict[str, tuple[tuple[int, ...], ...]] = {
    "bij,bjk->bik": ((2, 3, 4), (2, 4, 5)),
    "bhid,bhjd->bhij": ((2, 3, 4, 5), (2, 3, 6, 5)),
    "ij,jk": ((3, 4), (4, 5)),
    "...ij,...jk->...ik": ((2, 1, 3, 4), (5, 4, 2)),
    "...i,...i->...": ((5, 1, 3), (2, 5, 4, 3)),
    "i,j->ij": ((3,), (4,)),
    ",i->i": ((), (4,)),
    "bi,bi->b": ((2, 3), (2, 3)),
    "bi,bi->bi": ((2, 3), (2, 3)),
    "ab,bc,cd->ad": ((2, 3), (3, 4), (4, 5)),
    "abc,cd->ad": ((2, 3, 4), (4, 5)),
    "ij,ij->": ((2, 3), (2, 3)),
    "bij,kj->kbi": ((2, 3, 4), (5, 4)),
    "cbi,ij->bcj": ((2, 3, 4), (4, 5)),
    "abi,baj->abij": ((2, 3, 4), (3, 2, 5)),
    " Ba , aB": ((2, 3), (3, 2)),
}


@pytest.mark.parametrize("equation", EQUATIONS)
def test_einsum_is_torchs(equation: str) -> None:
    """Also in its memory layout: where torch's result is contiguous, ours is."""
    operands = [normal(*shape) for shape in EQUATIONS[equation]]
    check_float_twin(Call(lambda *given: torch.einsum(equation, *given)), *operands, sites=len(operands) - 1)


@pytest.mark.parametrize("dims", [0, 1, ([1, 2], [0, 1]), ([-1], [1])], ids=str)
def test_tensordot_is_torchs(dims: Any) -> None:
    second = {1: normal(4, 5), 0: normal(2)}.get(dims, normal(3, 4, 5)) if isinstance(dims, int) else normal(3, 4, 5)
    check_float_twin(Call(lambda a, b: torch.tensordot(a, b, dims)), normal(2, 3, 4), second, sites=1)


class Duck:
    """What torch functions take for a tensor, though it is none."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*(torch.eye(4) if isinstance(arg, Duck) else arg for arg in args))

    def __rmatmul__(self, other: Tensor) -> Tensor:
        return other * 2


class Foreign:
    def __rmatmul__(self, other: Tensor) -> Tensor:
        return other * 2


class Subclass(Tensor):
    pass


WHOLE = torch.ones(3, 3, dtype=torch.int64)
LEFT_ALONE: dict[str, Callable[[Tensor], Tensor]] = {
    "integers": lambda x: x * (WHOLE @ WHOLE).sum() + torch.einsum("ij,jk->ik", WHOLE, WHOLE).sum(),
    "complex": lambda x: (x.to(torch.complex64) @ x.mT.to(torch.complex64)).real,
    "sparse": lambda x: torch.eye(3).to_sparse() @ x,
    "nested": lambda x: F.linear(torch.nested.as_nested_tensor([x, x[:2]]), torch.eye(4)).to_padded_tensor(0.0),
    "subclass": lambda x: (x @ torch.eye(4).as_subclass(Subclass)).as_subclass(Tensor),
    "duck": lambda x: torch.matmul(x, Duck()) + F.linear(x, Duck()),  # type: ignore[call-overload, arg-type]
    "foreign": lambda x: x @ Foreign(),  # type: ignore[operator, no-any-return]
    "out": lambda x: x + torch.mm(x.detach(), torch.eye(4), out=torch.empty(3, 4)),
    "addmm out": lambda x: x + torch.addmm(x.detach(), x.detach(), torch.eye(4), out=torch.empty(3, 4)),
    "inner of a scalar": lambda x: torch.inner(x, torch.tensor(2.0)),
    "diagonal": lambda x: torch.einsum("ii,ij->j", torch.eye(3), x),
    "spread": lambda x: torch.tensordot(x[:, :1], torch.eye(4), ([1], [0])),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_cannot_be_emulated_is_left_to_torch(name: str) -> None:
    check_float_twin(Call(LEFT_ALONE[name]), normal(3, 4), sites=0)


def test_what_is_left_to_torch_is_listed() -> None:
    model = lnpu.convert(Call(LEFT_ALONE["integers"]))
    found = lnpu.coverage(model, normal(3, 4)).products
    assert found is not None and [(each.op, each.macs) for each in found] == [("aten.mm", 27), ("aten.bmm", 27)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:torch.compile with fullgraph=True found no compiled frames")  # torch 2.12's
def test_what_calls_other_ops_out_of_sight_is_listed() -> None:
    model = lnpu.convert(Call(flex_attention))
    found = lnpu.coverage(model, *[torch.randn(1, 2, 8, 16)] * 3)
    assert found.products is not None and [(each.op, each.macs) for each in found.products] == [
        ("flex_attention", None)
    ]
    assert "at least 0 of 0 MACs" in str(found) and "an unknown number" in str(found)


def test_grouped_products_in_float_are_listed() -> None:
    """As mixtures of experts make them, of views of their weights; an expert each for two rows and for three."""
    experts = Call(lambda x, w: F.grouped_mm(x, w.mT, offs=ENDS), torch.randn(3, 16, 8))
    for op in ("aten._grouped_mm", "aten.mm"):
        found = lnpu.coverage(experts, normal(5, 8)).products
        assert found is not None and [(each.op, each.macs) for each in found] == [(op, 5 * 8 * 16)]
        lnpu.convert(experts, overrides={"*:grouped_mm": None})


class Net(nn.Module):
    """A layer, a product with a weight, one of activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.layer = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x @ self.weight) @ x.mT


X = normal(2, 3, 4)


def train(model: nn.Module, x: Tensor = X) -> Tensor:
    output: Tensor = model(x)
    output.square().sum().backward()
    return output.detach()


def calls(counts: lnpu.Counts) -> dict[tuple[str, str], int]:
    return {(each.layer, each.step): each.calls for each in counts.steps}


@pytest.mark.parametrize("turned", [False, True])
def test_pairs_by_brute_force(turned: bool) -> None:
    model = lnpu.convert(Call(torch.matmul), "fp8")
    a, b = normal(3, 2, 5, 6).relu(), normal(3, 2, 7, 6).relu()
    given = a.clone().requires_grad_(), (b if turned else b.mT.contiguous()).clone().requires_grad_()
    error = normal(3, 2, 5, 7).relu()
    with lnpu.CostCounter(model) as cost:
        model(given[0], given[1].mT if turned else given[1]).backward(error)
    here, there, back = (each.ne(0).double() for each in (a, b.mT, error))
    expected = {
        "forward": (here @ there).sum(),
        "grad_input": (back @ there.mT).sum(),
        "grad_weight": (here.mT @ back).sum(),
    }
    assert [step.macs for step in cost.counts.steps] == [3 * 2 * 5 * 6 * 7] * 3
    assert {step.step: sum(sum(row[1:]) for row in step.pairs[1:]) for step in cost.counts.steps} == expected


@pytest.mark.parametrize("precision", ["fgmp", "fp8", Precision(accumulate="fp16", input="fp16", weight="fp16")])
def test_the_reference_counts_and_chooses_alike(precision: str | Precision) -> None:
    found = []
    for name in ("auto", "reference"):
        model = lnpu.convert(Call(torch.matmul), precision)
        a, b = normal(2, 3, 8, 9).relu().requires_grad_(), normal(2, 3, 9, 4).requires_grad_()
        with dispatch.backend(name), lnpu.CostCounter(model) as cost:
            for _ in range(2):
                model(a, b).square().sum().backward()
        found.append((cost.counts.steps, list(lnpu.thresholds(model).values()), a.grad, b.grad))
    (steps, states, *gradients), (reference, expected, *others) = found
    assert steps == reference and all(torch.equal(x, y) for x, y in zip(states, expected, strict=True))
    torch.testing.assert_close(gradients, others, rtol=2e-3, atol=1e-3)  # rounded to binary16 after sums of any order


def test_macs_are_those_of_torchs_flop_counter() -> None:
    layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    inputs = normal(2, 5, 8), normal(2, 6, 8)
    with FlopCounterMode(display=False) as flops, torch.no_grad(), torch.nn.attention.sdpa_kernel([]):
        layer.self_attn(inputs[0], inputs[0], inputs[0])
        layer.multihead_attn(inputs[0], inputs[1], inputs[1])
        layer._ff_block(inputs[0])
    lnpu.convert(layer)
    with lnpu.CostCounter(layer) as cost:
        layer(*inputs).sum().backward()
    forward = [step.macs for step in cost.counts.steps if step.step == "forward"]
    assert 2 * sum(forward) == flops.get_total_flops()
    found = lnpu.coverage(layer, *inputs)
    assert found.products == () and found.macs == sum(forward)


RULES = Precision(input=Rule(low=None), weight=Rule(), grad_output=Rule(high=None))


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_a_weight_gets_the_weights_rule_wherever_it_stands(name: str) -> None:
    function, inputs, weights = WITH_WEIGHTS[name]
    model = lnpu.convert(Call(function, *weights), RULES)
    model(*inputs)
    if name != "linear of a vector of weights":
        first = next(iter(emulations(model).values()))
        held = weights[0][0] if name == "groups of rows" else weights[0]  # one group's
        assert first.emulation.precision == RULES and first.weights == held.numel()


def test_products_of_activations_get_the_inputs_rule_or_their_own() -> None:
    given = ENTRIES
    for precision in (RULES, RULES.model_copy(update={"matmul": Precision(input="fp8")})):
        model = lnpu.convert(Call(torch.matmul), precision)
        model(*given)
        (site,) = emulations(model).values()
        assert site.emulation.precision == precision.of_activations() and site.weights == 0


def test_copies_compute_alike_and_count_for_themselves() -> None:
    model = lnpu.convert(Net())
    train(model)
    twins = [copy.deepcopy(model)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twins.append(pickle.loads(pickle.dumps(model)))
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twins.append(torch.load(file, weights_only=False))
    for twin in twins:
        assert list(emulations(twin)) == list(emulations(model)) and torch.equal(twin(X), model(X))
        with lnpu.CostCounter(model) as cost:
            twin(X)
        assert not cost.counts.steps


class Locked(nn.Module):
    """Its state cannot be copied as it is; it says itself how."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.lock = nn.Parameter(normal(4, 4)), threading.Lock()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.lock = threading.Lock()


class Copying(Locked):
    copies = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> Copying:
        twin = type(self)()
        twin.copies = self.copies + 1
        return twin


class Making(Locked):
    def __reduce__(self) -> Any:
        return Making, (), {"made": True}


@pytest.mark.filterwarnings("ignore:an emulated model is pickled whole")
def test_classes_that_copy_themselves_do_so() -> None:
    models = [lnpu.convert(cls()) for cls in (Locked, Copying, Making)]
    for model in models:
        model(X)
    twins = [*map(copy.deepcopy, models), *(pickle.loads(pickle.dumps(model)) for model in models)]
    assert [twin.copies for twin in (twins[1], twins[4])] == [1, 0] and twins[2].made and twins[5].made
    for twin, model in zip(twins, models * 2, strict=True):
        assert twin.lock is not model.lock
        assert list(emulations(twin)) == [":matmul"] and torch.equal(twin(X), model(X))
        assert type(lnpu.revert(twin)) is type(model).emulation_original


class Named(nn.Module):
    """Its names are words that an emulation might use, too."""

    def __init__(self) -> None:
        super().__init__()
        self.choices, self.waiting, self.sites = nn.ModuleList([nn.Linear(4, 4)]), nn.Parameter(normal(4, 4)), 3
        self.register_buffer("counting", torch.ones(()))

    def state(self, x: Tensor) -> Tensor:
        return self.choices[0](x) @ self.waiting  # type: ignore[no-any-return]

    def states(self) -> int:
        return self.sites

    def forward(self, x: Tensor) -> Tensor:
        return self.state(x) * self.states() * self.get_buffer("counting")


def test_a_users_names_are_left_alone() -> None:
    assert check_float_twin(Named(), X) == [":matmul", "choices.0"]


class Registering(nn.Module):
    known: list[str] = []

    def __init_subclass__(cls, name: str) -> None:
        Registering.known.append(name)


class Registered(Registering, name="one"):
    def forward(self, x: Tensor) -> Tensor:
        return x @ x.mT


def test_a_users_class_does_not_hear_of_ours() -> None:
    check_float_twin(Registered(), normal(3, 4))
    assert Registering.known == ["one"]


def test_thresholds_wait_for_their_sites() -> None:
    model = lnpu.convert(Net())
    train(model)
    states = lnpu.thresholds(model)
    assert list(states) == [":matmul", ":matmul.2", "layer"]
    fresh = lnpu.convert(Net())
    lnpu.load_thresholds(fresh, states)
    assert lnpu.thresholds(fresh).keys() == states.keys()
    assert torch.equal(fresh.eval()(X), model.eval()(X))


@pytest.mark.parametrize("wrong", [None, torch.zeros(3, dtype=torch.int32), torch.zeros(6, 2)], ids=str)
def test_what_can_be_no_thresholds_of_a_site_restores_nothing(wrong: Any) -> None:
    model = lnpu.convert(Net())
    train(model)
    fresh = lnpu.convert(Net())
    before = lnpu.thresholds(fresh)
    with pytest.raises(ConfigError, match="thresholds of ':matmul'"):
        lnpu.load_thresholds(fresh, lnpu.thresholds(model) | {":matmul": wrong})
    assert all(torch.equal(state, before[name]) for name, state in lnpu.thresholds(fresh).items())


def test_thresholds_of_a_site_that_stays_in_float_are_those_of_another_model() -> None:
    model, other = lnpu.convert(Net()), lnpu.convert(Net(), overrides={":matmul": None})
    train(model)
    with pytest.raises(ConfigError, match="':matmul'"):
        lnpu.load_thresholds(other, lnpu.thresholds(model))


def test_overrides_only_and_none() -> None:
    def emulated(chosen: str | None = "fgmp", **options: Any) -> list[str]:
        model = lnpu.convert(nn.Sequential(Net(), nn.Linear(3, 2)), chosen, **options)
        model(X)
        return list(emulations(model))

    sites = ["0:matmul", "0:matmul.2", "0.layer", "1"]
    assert emulated() == sites
    assert emulated(only=(nn.Linear,)) == ["0.layer", "1"]
    assert emulated(overrides={"0:matmul.2": None}) == [sites[0], *sites[2:]]
    assert emulated(overrides={"0": None}) == ["0.layer", "1"]
    assert emulated(overrides={"0*": None, "0:matmul": "fp8"}) == ["0:matmul", "1"]
    assert emulated(overrides={"*.layer": None}) == ["0:matmul", "0:matmul.2", "1"]
    assert emulated(None, overrides={"*:*.2": "fp8"}) == ["0:matmul.2"]
    with pytest.raises(ConfigError, match="nearest: matmul"):
        emulated(overrides={"0:matmull": None})


def test_a_module_left_in_float_says_so() -> None:
    model = lnpu.convert(nn.Sequential(Net(), nn.Linear(3, 2)), overrides={"0": None})
    found = lnpu.coverage(model, X)
    assert [(row.layer, row.reason) for row in found.in_float] == [("0", "left in float by choice")]


def test_converted_twice_it_begins_anew_and_open_counters_go_on() -> None:
    model = lnpu.convert(Net())
    with lnpu.CostCounter(model) as cost:
        train(model)
        lnpu.convert(model, "fp8")
        assert list(emulations(model)) == ["layer"]
        train(model)
        lnpu.revert(model)
        train(model)
    assert type(model) is Net and not any(name.startswith("emulation") for name in vars(model))
    assert set(calls(cost.counts).values()) == {2} and len(cost.counts.steps) == 9


def test_a_bound_forward_outlives_the_emulation() -> None:
    model = lnpu.convert(Net())
    held = model.forward
    expected = lnpu.revert(copy.deepcopy(model))(X)
    model.forward = lambda x: held(x)
    assert not torch.equal(model(X), expected)
    assert torch.equal(lnpu.revert(model)(X), expected)


def test_a_forward_that_was_replaced_before_says_so() -> None:
    model = nn.Sequential(Net(), nn.Linear(3, 2))
    model[0].forward = model[0].forward
    found = lnpu.coverage(lnpu.convert(model), X)
    assert {row.layer: row.reason for row in found.in_float} == {"0": "its forward was replaced: convert before that"}


def test_uncounted_calls_make_sites_that_count_later() -> None:
    model = lnpu.convert(Net())
    with lnpu.CostCounter(model) as cost:
        with lnpu.no_count(model):
            train(model)
        train(model)
    assert set(calls(cost.counts).values()) == {1} and len(cost.counts.steps) == 9


@pytest.mark.parametrize("way", [torch.inference_mode, torch.no_grad])
def test_sites_first_seen_without_gradients_train_later(way: Callable[[], Any]) -> None:
    """As in Lightning's sanity check of the validation loop."""
    model = lnpu.convert(Net())
    with way():
        model(X)
    twin = lnpu.convert(Net())
    assert torch.equal(train(model), train(twin))


def test_transforms_are_refused_and_leave_nothing_behind() -> None:
    model = lnpu.convert(Net())
    with pytest.raises(RuntimeError, match="revert"):
        torch.func.vmap(model)(X)
    with pytest.raises(RuntimeError, match="revert"):
        torch.func.grad(lambda x: model(x).sum())(X)
    assert list(emulations(model)) == ["layer"]
    train(model)


def test_an_exception_leaves_no_mode_behind() -> None:
    def fail(x: Tensor) -> Tensor:
        raise KeyError(x @ x)

    inner = Call(fail)

    def outer(x: Tensor) -> Tensor:
        try:
            output: Tensor = inner(x)
        except KeyError:
            return x @ x
        return output

    model = Call(outer)
    model.inner = inner
    lnpu.convert(model)
    for _ in range(2):
        model(normal(3, 3))
        with pytest.raises(KeyError):
            inner(normal(3, 3))
    assert torch._C._len_torch_function_stack() == 0
    assert list(emulations(model)) == [":matmul", "inner:matmul"]


def test_threads_share_the_sites() -> None:
    model, ready, failed = lnpu.convert(Net()), threading.Barrier(4), list[Exception]()

    def work() -> None:
        ready.wait()
        try:
            train(model)
        except RuntimeError as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    with lnpu.CostCounter(model) as cost:
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert not failed and set(calls(cost.counts).values()) == {4} and len(cost.counts.steps) == 9


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(normal(4, 4))

    def forward(self, x: Tensor, depth: int = 2) -> Tensor:
        deeper = x @ self.weight
        return self(deeper, depth - 1) if depth else deeper @ x.mT


class Standardized(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.again = self.inner

    def forward(self, index: Tensor) -> Tensor:
        return F.linear(self.again(self.inner(self.table(index))), self.table.weight)


class LoRA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(4, 5), nn.Linear(4, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * 2  # type: ignore[no-any-return]


class Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.layer.register_forward_hook(lambda module, args, output: output @ output.mT)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


MODULES: dict[str, tuple[Callable[[], nn.Module], Tensor, int]] = {
    "recursive": (Recursive, X, 2),
    "standardized": (lambda: nn.Sequential(Standardized(4, 5), nn.ReLU(), Standardized(5, 2)), X, 2),
    "tied": (Tied, torch.tensor([1, 2, 3]), 2),
    "LoRA": (LoRA, X, 3),
    "hooks": (Hooked, X, 2),
    "weight_norm": (lambda: parametrizations.weight_norm(Standardized(4, 5)), X, 1),
    "spectral_norm": (lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 5))), X, 1),
    "pruned": (lambda: prune.l1_unstructured(Standardized(4, 5), "weight", 0.5), X, 1),
}


@pytest.mark.parametrize("name", MODULES)
def test_layers_of_other_makes(name: str) -> None:
    make, x, sites = MODULES[name]
    check_float_twin(make(), x, sites=sites)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What one test's compilation gives up, torch would leave uncompiled in others, too."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_compiled_whole_it_computes_and_counts_as_eager(backend: str) -> None:
    """A site, and a layer, that are left in float stay so within a module that is not."""
    model = nn.Sequential(Net(), nn.TransformerEncoderLayer(3, 1, 4, 0.0, batch_first=True), nn.Linear(3, 2))
    lnpu.convert(model, overrides={"0:matmul.2": None, "0.layer": None, "1.self_attn": None})
    train(model)
    model.zero_grad()
    twin = copy.deepcopy(model)
    with lnpu.CostCounter(model) as cost:
        expected = train(model)
    with lnpu.CostCounter(twin) as compiled:
        found = train(torch.compile(twin, fullgraph=True, backend=backend))  # type: ignore[arg-type]
    assert torch.equal(found, expected)
    assert calls(compiled.counts) == calls(cost.counts) and ("0:matmul", "forward") in calls(cost.counts)
    for ours, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_compiled_before_it_ran_says_what_to_do() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="run the model on a batch before it is compiled"):
        torch.compile(lnpu.convert(Net()), fullgraph=True, backend="eager")(X)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")  # of torch's exporter, about itself
def test_exported_it_rounds_as_before(strict: bool) -> None:
    model = lnpu.convert(Net()).eval()
    with pytest.raises(RuntimeError, match="run the model on a batch before it is compiled"):
        torch.export.export(model, (X,), strict=strict)
    model(X)
    exported: Any = torch.export.export(model, (X,), strict=strict)
    assert torch.equal(exported.module()(X), model(X))


@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_traced_it_is_in_float_and_reverted_it_is_torchs() -> None:
    model = lnpu.convert(Net()).eval()
    model(X)
    expected = lnpu.revert(copy.deepcopy(model))
    assert torch.equal(torch.jit.trace(model, (X,), check_trace=False)(X), expected(X))  # type: ignore[no-untyped-call]
    exported: Any = torch.export.export(lnpu.revert(model), (X,))
    assert torch.equal(exported.module()(X), expected(X))


def test_a_graph_says_that_it_came_too_late() -> None:
    graph = lnpu.convert(torch.fx.symbolic_trace(Net()))
    found = lnpu.coverage(graph, X)
    assert {row.layer: row.reason for row in found.in_float} == {
        "(model)": "its forward is a graph: convert the model before it is traced"
    }
    assert copy.deepcopy(graph)(X).shape == graph(X).shape


def test_autocast_returns_its_dtype() -> None:
    model = lnpu.convert(Net())
    with torch.autocast("cpu", torch.bfloat16):
        assert train(model).dtype == torch.bfloat16
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_module_computes_alike(reentrant: bool) -> None:
    plain, recomputed = lnpu.convert(Net()), lnpu.convert(Net())
    x = X.clone().requires_grad_()
    plain(x).square().sum().backward()
    checkpoint(recomputed, x, use_reentrant=reentrant).square().sum().backward()
    for ours, theirs in zip(recomputed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    assert lnpu.thresholds(recomputed).keys() == lnpu.thresholds(plain).keys()


class Checkpointing(nn.Module):
    """Wraps the forward of each class derived from it, as transformers does, and checkpoints in the last one."""

    def __init_subclass__(cls) -> None:
        forward = cls.forward

        @functools.wraps(forward)
        def wrapped(self: nn.Module, x: Tensor) -> Tensor:
            if type(self).forward is not wrapped:
                return forward(self, x)  # type: ignore[no-any-return]
            return checkpoint(functools.partial(forward, self), x, use_reentrant=False)  # type: ignore[no-any-return]

        cls.forward = wrapped  # type: ignore[method-assign]


class Recomputed(Checkpointing, Net):
    runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return super().forward(x)


def test_a_module_that_checkpoints_its_own_forward_goes_on_to() -> None:
    plain, recomputed = lnpu.convert(Net()), lnpu.convert(Recomputed())
    with lnpu.CostCounter(recomputed) as cost:
        train(recomputed)
    train(plain)
    assert recomputed.runs == 2
    assert {(each.layer, each.calls) for each in cost.counts.steps if each.step == "forward"} == {
        *((":matmul", 2), (":matmul.2", 2), ("layer", 2))
    }
    for ours, theirs in zip(recomputed.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)  # type: ignore[arg-type]
    assert type(lnpu.revert(recomputed)) is Recomputed


def parallel(x: Tensor) -> tuple[list[Tensor], dict[tuple[str, str], int], dict[str, Tensor]]:
    rank, model = dist.get_rank(), lnpu.convert(Net())
    wrapped = DistributedDataParallel(model)
    shared = lnpu.ThresholdSync(model)
    with lnpu.CostCounter(wrapped) as cost:
        for _ in range(2):
            wrapped.zero_grad()
            wrapped(x[rank : rank + 1]).square().sum().backward()
            shared.all_reduce()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return gradients, calls(cost.counts), lnpu.thresholds(model)


def test_ranks_agree_on_gradients_and_on_thresholds_of_sites_that_came_later() -> None:
    (ours, counted, states), (theirs, others, expected) = on_ranks(parallel, X)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert counted == others and set(counted.values()) == {2} and len(counted) == 9
    assert states.keys() == expected.keys() and all(torch.equal(states[name], expected[name]) for name in states)

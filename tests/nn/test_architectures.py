"""Other people's architectures, whole and unchanged: a handful always, all of them where time allows."""

import importlib.util

import pytest
import torch
from torch import nn

import lnpu_torch as lnpu
from architectures import PAGE, ZOO, Entry, examine
from lnpu_torch.recipes.torchvision_compat import import_torchvision

OFTEN = ("torchvision resnet18", "timm convnext_atto", "timm lcnet_050")
BY_NAME = {f"{entry.source} {entry.name}": entry for entry in ZOO}

# of torchvision's and timm's models, about their future defaults
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in OFTEN else [pytest.mark.slow]) for name in BY_NAME]
)
def test_a_step_closes_and_reverts_bit_for_bit(name: str) -> None:
    entry = BY_NAME[name]
    if importlib.util.find_spec(entry.source) is None:
        pytest.skip(f"{entry.source} is not installed")
    finding = examine(entry)
    assert finding.coverage.emulated and finding.coverage.products == ()


class Small(Entry):
    """A class of torchvision's, of other sizes than those of the models that it has a name for."""

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model: nn.Module = getattr(import_torchvision().models, self.name)(num_classes=10, **self.options)
        return model


VIT = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
SWIN = {"patch_size": [4, 4], "embed_dim": 12, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": [7, 7]}


@pytest.mark.parametrize(
    "entry",
    [
        Small("torchvision", "VisionTransformer", options=VIT),
        Small("torchvision", "SwinTransformer", 64, {**SWIN, "stochastic_depth_prob": 0.2}),
    ],
    ids=lambda entry: entry.name,
)
def test_a_step_of_a_small_transformer_closes_and_reverts_bit_for_bit(entry: Entry) -> None:
    """The blocks and the modules are those of vit_b_16 and swin_t, which are large."""
    finding = examine(entry)
    assert finding.coverage.emulated and finding.coverage.products == ()


def test_the_page_has_them_all() -> None:
    assert len(ZOO) >= 40 and set(OFTEN) <= BY_NAME.keys()
    page = PAGE.read_text()
    assert all(f"| {name} |" in page for name in BY_NAME)


class Attention(nn.Module):
    """One head, with each product written another way."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        heads = (each.unsqueeze(1) for each in (q, k, v))
        fused = nn.functional.scaled_dot_product_attention(*heads).squeeze(1)
        return (q @ k.transpose(1, 2)).softmax(-1) @ v + fused


def test_products_in_float_by_hand() -> None:
    """2 samples of 3 positions and 4 channels: each of attention's products has 2 * 3 * 3 * 4 macs."""
    model = lnpu.convert(nn.Sequential(Attention(), nn.BatchNorm1d(3)), only=(nn.Linear,))
    states = {name: value.clone() for name, value in model.state_dict().items()}
    x, random = torch.ones(2, 3, 4), torch.get_rng_state()
    coverage = lnpu.coverage(model, x)
    macs = {(product.layer, product.op): product.macs for product in coverage.products or ()}
    assert macs == {("0", "aten.bmm"): 2 * 72, ("0", "aten._scaled_dot_product_flash_attention_for_cpu"): 2 * 72}
    assert coverage.macs == 4 * 72 + 2 * 3 * 4 * 12
    assert "288 of 576 MACs of a forward pass in float (50.0%)" in str(coverage)
    assert lnpu.coverage(model).products is None and "macs" not in str(lnpu.coverage(model))
    assert all(torch.equal(value, states[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and model[0].qkv.emulation.counters.sum() == 0
    every = lnpu.coverage(lnpu.convert(model), x)
    assert every.products == () and every.macs == coverage.macs


@pytest.mark.parametrize("how", ["fgmp", lnpu.Precision(accumulate="fp16"), lnpu.Precision(result="fp16")], ids=str)
@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 5, 3)])
def test_an_output_may_be_changed_in_place(how: str | lnpu.Precision, shape: tuple[int, ...]) -> None:
    gradients = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = lnpu.convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace)), how)
        model(torch.randn(shape)).sum().backward()
        gradients.append(model[0].weight.grad)
    assert torch.equal(*gradients)

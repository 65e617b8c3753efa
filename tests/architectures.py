"""Other people's architectures, from torchvision and timm: what a training step with each proves, and the page of it.

python tests/architectures.py    # writes docs/zoo.md; needs lnpu-torch[recipes] and timm
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import lnpu_torch as lnpu
from helpers.paths import ROOT
from lnpu_torch.nn import EMULATED_CLASSES
from lnpu_torch.nn.convert import Coverage
from lnpu_torch.recipes.torchvision_compat import import_torchvision

NAMES = {each.__name__ for each in EMULATED_CLASSES}
PAGE = ROOT / "docs" / "zoo.md"


class Entry(NamedTuple):
    """A model: where it is from, its name, the height of its square images, and what it is built with."""

    source: str
    name: str
    size: int = 32
    options: dict[str, Any] = {}

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        if self.source == "timm":
            import_torchvision()  # timm imports it; its compiled part may not fit torch
            import timm

            return timm.create_model(self.name, num_classes=10, **self.options)
        return import_torchvision().models.get_model(self.name, num_classes=10, weights=None, **self.options)

    def batch(self) -> Tensor:
        frames = (4,) if self.name == "r3d_18" else ()
        return torch.randn(4, 3, *frames, self.size, self.size, generator=torch.Generator().manual_seed(0))


def _of(source: str, names: str, size: int = 32, **options: Any) -> list[Entry]:
    return [Entry(source, name, size, options) for name in names.split()]


TORCHVISION = [
    *_of("torchvision", "resnet18 resnet50 resnext50_32x4d wide_resnet50_2 vgg11 vgg16_bn densenet121"),
    *_of("torchvision", "mobilenet_v2 mobilenet_v3_small mobilenet_v3_large shufflenet_v2_x0_5"),
    *_of("torchvision", "efficientnet_b0 efficientnet_v2_s convnext_tiny regnet_y_400mf"),
    *_of("torchvision", "squeezenet1_1 alexnet googlenet swin_t mnasnet0_5 regnet_x_400mf", 64),
    *_of("torchvision", "swin_v2_t", 256),  # padded windows have errors beyond FP16: they normalise zeros
    *_of("torchvision", "inception_v3", 96, aux_logits=False, init_weights=False),
    *_of("torchvision", "vit_b_16", image_size=32),
    *_of("torchvision", "r3d_18"),
    *_of("torchvision", "fcn_resnet50", weights_backbone=None),
]
TIMM = [
    *_of("timm", "resnet10t resnetv2_50 efficientnet_b0 mobilenetv3_small_050 mobilenetv4_conv_small convnext_atto"),
    *_of("timm", "convnextv2_atto regnetx_002 regnety_002 ghostnet_050 lcnet_050 mnasnet_small tinynet_e repvgg_a0"),
    *_of("timm", "dla34 nf_resnet26 fbnetc_100 efficientvit_b0 densenet121 gernet_s", 64),
    *_of("timm", "poolformer_s12 edgenext_xx_small mobilevit_xxs", 64),
    *_of("timm", "vit_tiny_patch16_224 deit_tiny_patch16_224 mixer_s32_224 resmlp_12_224", 64, img_size=64),
    *_of("timm", "swin_tiny_patch4_window7_224", 64, img_size=64),
]
ZOO = [*TORCHVISION, *TIMM]


class Finding(NamedTuple):
    """What is emulated of a model: its coverage, its sites, and the shares of a forward pass's macs left in float.

    `of_layers`: the share where torch's own layers alone are emulated.
    """

    entry: Entry
    coverage: Coverage
    sites: int
    of_layers: float
    share: float


def examine(entry: Entry) -> Finding:
    """Convert, a training step, revert; an AssertionError where macs do not close or something does not come back."""
    model, images = entry.build(), entry.batch()
    twin, types = copy.deepcopy(model), [type(module) for module in model.modules()]
    whole = lnpu.coverage(model, images).macs
    layers = _in_float(lnpu.coverage(lnpu.convert(model, "fgmp", only=tuple(EMULATED_CLASSES)), images))
    coverage = lnpu.coverage(lnpu.convert(model, "fgmp"), images)
    counts = _step(model, images)
    forward = sum(row.macs for row in counts.steps if row.step == "forward")
    assert whole and forward == whole - _in_float(coverage), "macs are not those of torch's FLOP formulas"
    for chip in ("lnpu", "dense-fp16"):
        for row in lnpu.price(counts, chip).rows:
            assert row.macs == row.executed + row.skipped + row.padding + row.not_run
    assert [type(module) for module in lnpu.revert(model).modules()] == types
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for ours, theirs in zip(tree_leaves(model.eval()(images)), tree_leaves(twin.eval()(images)), strict=True):
            assert torch.equal(ours, theirs), "reverted, it does not compute as before"
    sites = {row.layer for row in counts.steps if ":" in row.layer}
    return Finding(entry, coverage, len(sites), layers / whole, _in_float(coverage) / whole)


def _in_float(coverage: Coverage) -> int:
    """Multiply-accumulates of a forward pass that are not emulated."""
    return sum(product.macs or 0 for product in coverage.products or ())


def _step(model: nn.Module, images: Tensor) -> lnpu.Counts:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with lnpu.CostCounter(model) as cost:
        loss = sum(out.float().square().mean() for out in tree_leaves(model.train()(images)) if out is not None)
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    changed = [p.grad.isfinite().all() for p in model.parameters() if p.grad is not None]
    assert changed and all(changed), "gradients are missing, or not finite"
    return cost.counts


HEAD = """# Other people's architectures

Each is converted as it is, trained for one step with FGMP on four images, and reverted: gradients are finite, all MACs
are executed, skipped, padding or not run, the forward MACs equal those of torch's FLOP formulas, and the reverted
model computes bit for bit what torch's own does with the same `state_dict`. `python tests/architectures.py` makes
this page; `make test-slow` tests what is installed of it (timm is not in any of our extras).

"In float" is the share of a forward pass's multiplications that is not emulated, as `lnpu.coverage(model, batch)` lists
them: first where torch's own layers alone are (`convert(model, only=...)`), then as `convert` does it by itself. A
site is a product that a module's own forward calls. The last column is what else with weights stayed in float: nothing
of it multiplies and accumulates.

| | image | layers | sites | in float, layers alone | in float | which | other modules with weights |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def line(finding: Finding) -> str:
    entry, coverage, sites, of_layers, share = finding
    layers = sum(row.kind in NAMES for row in coverage.emulated)
    which = ", ".join(sorted({product.op.removeprefix("aten.") for product in coverage.products or ()})) or "-"
    kinds = ", ".join(f"{kind} {count}" for kind, count in Counter(row.kind for row in coverage.in_float).most_common())
    return (
        f"| {entry.source} {entry.name} | {entry.size} | {layers} | {sites} | {of_layers:.1%} | {share:.1%} | {which} "
        f"| {kinds or '-'} |\n"
    )


if __name__ == "__main__":
    text = HEAD
    for each in ZOO:
        try:
            text += line(examine(each))
            print(each.source, each.name, "ok", flush=True)
        except Exception as error:
            print(each.source, each.name, "FAILED", type(error).__name__, str(error)[:300], flush=True)
    PAGE.write_text(text)

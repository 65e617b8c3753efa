"""How far each precision turns the gradients of the weights, beside what the choice of a batch does to them.

python benchmarks/gradients.py cifar.npz --steps 100      # x_train [N, 3, 32, 32] uint8, y_train [N]

One number for each precision needs no training to its end and no seeds: |g - g32| / |g32|, from the same weights,
images and dropout, over all weights and in the worst layer. "batch" is float32's gradient of another batch in place of
g. The weights are those after some steps of training in float32; thresholds are those of the images, seen once.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from torch import Tensor, nn

import lnpu_torch as lnpu
from lnpu_torch.quant.precision import PRESETS, precision
from lnpu_torch.recipes.models import ModelConfig, build

CLASSES, SHAPE = 10, (3, 32, 32)
NETWORKS = {
    "ResNet-18": (ModelConfig(name="resnet18_cifar"), 0.1),
    "VGG16": (ModelConfig(name="vgg16_cifar"), 0.05),
    "VGG16 without batch norm": (ModelConfig(name="vgg16_cifar", batch_norm=False), 0.02),
    "AlexNet": (ModelConfig(name="alexnet_cifar"), 0.02),
}
"""Each with the learning rate of its short training."""
SCALE = 2.0**10
"""Of the loss, as a GradScaler's: else errors would fall below the least FP16 numbers."""
FGMP = PRESETS["fgmp"]
PRECISIONS = {
    "fgmp": precision("fgmp"),
    "... of inputs alone": lnpu.Precision(input=FGMP, result="fp32"),
    "... of weights alone": lnpu.Precision(weight=FGMP, result="fp32"),
    "... of errors alone": lnpu.Precision(grad_output=FGMP, result="fp32"),
    "fp8": precision("fp8"),
    "fp16": precision("fp16"),
}
Batch = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--steps", type=int, default=100, help="of training, before it is measured")
    parser.add_argument("--width", type=int, help="channels of the first stage, in place of the recipe's")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=4, help="that are measured; their mean counts")
    options = parser.parse_args()
    with np.load(options.images) as file:
        images, labels = torch.from_numpy(file["x_train"]), torch.from_numpy(file["y_train"]).long()
    print("| relative error of the gradients, % (worst layer) | " + " | ".join(NETWORKS) + " |")
    print("| --- " * (len(NETWORKS) + 1) + "|")
    columns = []
    for config, rate in NETWORKS.values():
        config = config.model_copy(update={"width": options.width}) if options.width else config
        columns.append(measured(config, rate, images, labels, options))
    for name in ("batch", *PRECISIONS):
        cells = ("{} ({})".format(*map(percent, column[name])) for column in columns)
        print(f"| {name} | {' | '.join(cells)} |")


def percent(share: float) -> str:
    """Two digits, without a power of ten."""
    return f"{100 * share:.2g}" if share < 0.995 else f"{100 * share:.0f}"


def measured(
    config: ModelConfig, rate: float, images: Tensor, labels: Tensor, options: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    """The errors that "batch" and each precision make, overall and in the worst layer."""
    torch.manual_seed(0)
    model = build(config, CLASSES, SHAPE)
    generator = torch.Generator().manual_seed(0)

    def batch() -> Batch:
        chosen = torch.randint(len(images), (options.batch,), generator=generator)
        return (images[chosen].float() / 255 - 0.5) / 0.25, labels[chosen]

    train(model, rate, [batch() for _ in range(options.steps)])
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ("batch", *PRECISIONS)}
    for _ in range(options.batches):
        here, other = batch(), batch()
        exact = gradients(model, here)
        found["batch"].append(error(gradients(model, other), exact))
        for name, chosen in PRECISIONS.items():
            emulated = lnpu.convert(deepcopy(model), chosen)
            gradients(emulated, here)
            found[name].append(error(gradients(emulated, here), exact))
    return {name: (mean(whole for whole, _ in each), mean(worst for _, worst in each)) for name, each in found.items()}


def train(model: nn.Module, rate: float, batches: list[Batch]) -> None:
    """SGD, the rate risen over the first tenth."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    for step, (x, y) in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * min(1, 10 * (step + 1) / len(batches))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def gradients(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The gradients of all weights of convolutions and linear layers, by one batch."""
    torch.manual_seed(1)  # the same dropout
    model.zero_grad()
    (SCALE * nn.functional.cross_entropy(model(batch[0]), batch[1])).backward()
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return [weight.grad / SCALE for weight in weights if weight.grad is not None]


def error(found: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """|found - exact| / |exact|, over all layers and in the worst one."""
    pairs = [(float((a - b).square().sum()), float(b.square().sum())) for a, b in zip(found, exact, strict=True)]
    whole = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
    return whole**0.5, max(a / b for a, b in pairs) ** 0.5


if __name__ == "__main__":
    main()

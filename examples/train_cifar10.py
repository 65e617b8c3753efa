"""CIFAR-10 on LNPU, in one file of plain torch to copy and change. Run it: python examples/train_cifar10.py

A residual network of 0.27 million weights with FGMP precision: accuracy and energy after each epoch. The lines with
`lnpu` are all that the emulation takes. Needs CIFAR-10: torchvision's (pip install 'lnpu-torch[recipes]') downloads
it, or give --data FILE.npz with uint8 x_train [N, 3, 32, 32], y_train [N], x_test, y_test.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lnpu_torch as lnpu

Images = tuple[Tensor, Tensor]
"""Normalised images, float32 [N, 3, 32, 32], and their classes, int64 [N]."""


class Block(nn.Module):
    """Two 3x3 convolutions and what goes past them."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.past = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.past(x))


def network(width: int = 16, blocks: int = 3) -> nn.Module:
    """ResNet-20, by default: three stages of blocks, each half as large and twice as wide as the one before."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    for stage in range(3):
        outputs = width << stage
        for block in range(blocks):
            first = stage > 0 and block == 0
            layers.append(Block(outputs // 2 if first else outputs, outputs, stride=2 if first else 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width * 4, 10))


def load(path: str | None, synthetic: int) -> tuple[Images, Images]:
    """Training and test images: from an .npz file, from torchvision, or so many random ones."""
    if synthetic:
        images, labels = np.random.default_rng(0).integers(0, 256, (synthetic, 3, 32, 32)), np.arange(synthetic) % 10
        return prepared(images, labels), prepared(images, labels)
    if path:
        with np.load(path) as file:
            train, test = ((file[f"x_{part}"], file[f"y_{part}"]) for part in ("train", "test"))
        return prepared(*train), prepared(*test)
    from torchvision.datasets import CIFAR10

    sets = [CIFAR10("data", train=train, download=True) for train in (True, False)]
    train, test = ((each.data.transpose(0, 3, 1, 2), np.asarray(each.targets)) for each in sets)
    return prepared(*train), prepared(*test)


def prepared(images: np.ndarray, labels: np.ndarray) -> Images:
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)))
    return (torch.from_numpy(images).float() / 255 - mean) / std, torch.from_numpy(labels).long()


def augmented(images: Tensor) -> Tensor:
    """Each batch moved by up to four pixels, half of the images mirrored."""
    across, down = torch.randint(0, 9, (2,)).tolist()
    moved = F.pad(images, (4, 4, 4, 4))[:, :, down : down + 32, across : across + 32]
    return torch.where(torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5, moved.flip(3), moved)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True))
    return right / len(labels)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", metavar="FILE.npz")
    parser.add_argument("--synthetic", type=int, default=0, metavar="N", help="random images instead of CIFAR-10")
    parser.add_argument("--precision", default="fgmp", help="fgmp, fp8, fp16, a YAML file, or float32")
    parser.add_argument("--chip", default="lnpu")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (images, labels), test = load(options.data, options.synthetic)
    images, labels, test = images.to(device), labels.to(device), tuple(each.to(device) for each in test)

    model = network().to(device)
    emulated = options.precision != "float32"
    if emulated:
        lnpu.convert(model, options.precision)
    optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = options.epochs * -(-len(images) // options.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps)

    for epoch in range(1, options.epochs + 1):
        model.train()
        with lnpu.CostCounter(model) if emulated else nullcontext() as cost:
            for batch in torch.randperm(len(images), device=device).split(options.batch_size):
                loss = F.cross_entropy(model(augmented(images[batch])), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        line = f"epoch {epoch:>2}  loss {loss.item():.3f}  test accuracy {accuracy(model, *test):.1%}"
        print(f"{line}  {cost.report(options.chip).total.energy_pj / 1e12:.3f} J" if cost else line, flush=True)
    if cost:
        print(f"\nThe last epoch, layer by layer:\n\n{cost.report(options.chip)}")


if __name__ == "__main__":
    main()

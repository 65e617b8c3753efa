"""Your own model and your own loop, as on the chip: three lines more. Run it: python examples/swap_layers.py

Handwritten digits that scikit-learn ships with (pip install 'lnpu-torch[recipes]'); half a minute on one core.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import lnpu_torch as lnpu

IMAGES, LABELS = map(torch.from_numpy, load_digits(return_X_y=True))
IMAGES = IMAGES.float().view(-1, 1, 8, 8) / 16


class Net(nn.Module):
    """Any model of yours: it knows nothing of lnpu_torch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(512, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.head(x.flatten(1))


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Any loop of yours, too."""
    for batch in torch.randperm(1500).split(50):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES[batch]), LABELS[batch]).backward()
        optimizer.step()


def accuracy(model: nn.Module) -> float:
    with torch.no_grad(), lnpu.no_count(model):
        right = model.eval()(IMAGES[1500:]).argmax(1) == LABELS[1500:]
    model.train()
    return right.float().mean().item()


def main(epochs: int = 8) -> None:
    torch.manual_seed(0)
    model = Net()
    lnpu.convert(model, "fgmp")  # 1: in place; "fp8", "fp16", Precision(...) or a YAML file are others
    print(lnpu.coverage(model), "\n")

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(1, epochs + 1):
        with lnpu.CostCounter(model) as cost:  # 2: what is done in here is counted
            train_epoch(model, optimizer)
        total = cost.report("lnpu").total  # 3: and priced on a chip
        print(
            f"epoch {epoch}: test accuracy {accuracy(model):.2%}, {total.energy_pj / 1e9:.3f} mJ on the chip, "
            f"{total.zero_share:.1%} of the streamed operands zero, {total.fp8_share:.1%} of the rest FP8"
        )

    print("", cost.report("lnpu").by("layer"), sep="\n")
    lnpu.revert(model)  # torch's own layers again, with the weights that were trained
    print(f"\nin float: test accuracy {accuracy(model):.2%}")


if __name__ == "__main__":
    main()

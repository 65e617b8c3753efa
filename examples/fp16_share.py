"""How much FP16 does your network need? Train it at several shares, and compare. Run it: python examples/fp16_share.py

Handwritten digits that scikit-learn ships with (pip install 'lnpu-torch[recipes]'); under a minute on one core.
"""

from collections.abc import Sequence
from statistics import mean, stdev

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import lnpu_torch as lnpu

IMAGES, LABELS = map(torch.from_numpy, load_digits(return_X_y=True))
IMAGES = IMAGES.float().view(-1, 1, 8, 8) / 16
SHARES = (0, 0.05, 0.1, 0.2, 0.4, 1)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    first = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
    second = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(256, 10))


def gradient(model: nn.Module) -> torch.Tensor:
    """All weights' gradients on the first 200 images, in a row."""
    model.zero_grad()
    F.cross_entropy(model(IMAGES[:200]), LABELS[:200]).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def trained(model: nn.Module, epochs: int) -> float:
    """Accuracy on the images that it was not trained on, in percent."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, total_iters=30 * epochs)
    for _ in range(epochs):
        for batch in torch.randperm(1500).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(IMAGES[batch]), LABELS[batch]).backward()
            optimizer.step()
            slower.step()
    with torch.no_grad(), lnpu.no_count(model):
        return 100 * (model.eval()(IMAGES[1500:]).argmax(1) == LABELS[1500:]).float().mean().item()


def main(shares: Sequence[float] = SHARES, seeds: Sequence[int] = (0, 1, 2), epochs: int = 3) -> None:
    exact = gradient(network(0))
    plain = [trained(network(seed), epochs) for seed in seeds]
    bound = mean(plain) - stdev(plain)
    print(f"float32: accuracy {mean(plain):.2f} +- {stdev(plain):.2f} %; one image is {100 / 297:.2f} %\n")
    print("rule            FP16   gradient's error  accuracy           energy of training")
    enough: dict[str, float] = {}
    rules = {f"share <= {share:.2f}": lnpu.Rule(fp16_share=share) for share in shares}
    for name, rule in {**rules, "error <= 0.013": lnpu.Rule(max_error=0.013)}.items():
        error = (gradient(lnpu.convert(network(0), rule)) - exact).norm() / exact.norm()
        accuracies, models = [], [lnpu.convert(network(seed), rule) for seed in seeds]
        for model in models:
            with lnpu.CostCounter(model, vector_ops=False) as cost:
                accuracies.append(trained(model, epochs))
        total = cost.report("lnpu").total
        enough |= {name: total.energy_pj} if mean(accuracies) >= bound else {}
        print(
            f"{name:<14}{1 - total.fp8_share:>7.1%}{error:>16.2%}   "
            f"{mean(accuracies):>7.2f} +- {stdev(accuracies):.2f} %{total.energy_pj / 1e9:>16.3f} mJ"
        )
    cheapest = min(enough, key=lambda name: enough[name], default="none")
    print(f"\nThe cheapest that is not below float32 by more than its standard deviation: {cheapest}")


if __name__ == "__main__":
    main()

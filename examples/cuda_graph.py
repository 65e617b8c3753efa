"""Train an emulated network by a CUDA graph: the whole step is captured once, and replays are counted like any step.

Without a GPU the same steps are run one by one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import lnpu_torch as lnpu


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*layers)


def main(steps: int = 50, batch: int = 64) -> lnpu.Counts:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = lnpu.convert(network().to(device), "fgmp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    images = torch.randn(batch, 3, 32, 32, device=device)  # a graph reads its inputs where they lay: copy into them
    labels = torch.randint(10, (batch,), device=device)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = nn.functional.cross_entropy(model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    replay: Callable[[], object] = captured(step) if device == "cuda" else step
    with lnpu.CostCounter(model) as cost:
        for _ in range(steps):
            replay()
    print(lnpu.price(cost.counts, "lnpu"))
    return cost.counts


def captured(step: Callable[[], Tensor]) -> Callable[[], object]:
    """The step as a graph. It is run a few times before, on another stream: kernels are compiled, thresholds chosen."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


if __name__ == "__main__":
    main()

"""A training step of any model on random input: loss, loss scale, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lnpu_torch.counts.schema import Counts
from lnpu_torch.files import ConfigError
from lnpu_torch.nn.observers import pause_op_tracing
from lnpu_torch.profiler.layer_counters import no_count
from lnpu_torch.profiler.step_choices import Loss, OptimizerName

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-4),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
}
SCALES = 24
"""How often the loss scale is halved before gradients that overflow are the model's fault."""


class TrainingStep:
    """Steps of a model on one random batch. The first finds the loss scale and makes the optimizer's states.

    Args:
        network: the converted model; it is put in training mode.
        batch: its input.
        loss: None is cross-entropy where an output is [N, C, ...] with two classes or more, else the mean.
        optimizer: a key of OPTIMIZERS, or "none".
    """

    def __init__(self, network: nn.Module, batch: Tensor, loss: Loss | None, optimizer: OptimizerName) -> None:
        self._network, self._batch, self._loss = network.train(), batch, loss
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if not trained:
            raise ConfigError("the model has no parameter to train; --inference prices its forward pass")
        self._optimizer = OPTIMIZERS[optimizer](trained) if optimizer != "none" else None
        self._parameters = trained
        self.scale = 2.0**16

    def warm_up(self) -> None:
        """A step that is not counted; the loss scale is halved until no gradient overflows. Raises ConfigError."""
        with no_count(self._network):
            for _ in range(SCALES):
                if self.run():
                    return
                self.scale /= 2
        raise ConfigError("the model's gradients overflow at any loss scale")

    def run(self) -> bool:
        """Forward, backward, and the update if gradients are finite; returns whether they are. Raises ConfigError."""
        self.backward()
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        with pause_op_tracing():  # the scale is folded into the learning rate
            finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
            torch._foreach_div_(gradients, self.scale)
        if finite:
            self.update()
        return finite

    def update(self) -> None:
        """The optimizer's step."""
        if self._optimizer:
            self._optimizer.step()

    def backward(self) -> None:
        """Forward and backward, with the loss scaled. Raises ConfigError."""
        for parameter in self._parameters:
            parameter.grad = None
        with refusing(self._batch):
            outputs = tensors(self._network(self._batch))
            losses = [self._loss_of(output) for output in outputs if output.requires_grad]
            if not losses:
                raise ConfigError("the model returns no tensor that depends on its parameters; nothing to train")
            (sum(losses[1:], start=losses[0]) * self.scale).backward()

    def _loss_of(self, output: Tensor) -> Tensor:
        loss = self._loss or ("cross-entropy" if output.dim() > 1 and output.shape[1] > 1 else "mean")
        random = torch.Generator(device="cpu").manual_seed(0)
        if loss == "cross-entropy":
            if output.dim() < 2:
                raise ConfigError(f"--loss cross-entropy needs outputs [N, C, ...]; one has {output.dim()} dimensions")
            shape = (output.shape[0], *output.shape[2:])
            labels = torch.randint(output.shape[1], shape, generator=random, device="cpu").to(output.device)
            return F.cross_entropy(output.float(), labels)
        if loss == "mse":
            targets = torch.randn(output.shape, generator=random, device="cpu").to(output.device)
            return F.mse_loss(output.float(), targets)
        return output.float().mean()


@contextmanager
def refusing(batch: Tensor) -> Iterator[None]:
    """Within the block, what a model raises for an input that it cannot take is a ConfigError that says so."""
    try:
        yield
    except ConfigError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(f"the model cannot take an input of shape {tuple(batch.shape)}: {error}") from error


def infer(network: nn.Module, batch: Tensor) -> None:
    """One forward pass in evaluation mode. Raises ConfigError."""
    with refusing(batch), torch.no_grad():
        network.eval()(batch)


def silent_layers(counts: Counts) -> list[str]:
    """Layers all of whose errors are zero, although they were asked to propagate them."""
    return [
        entry.layer
        for entry in counts.steps
        if entry.step == "grad_weight" and entry.second.elements[0] and not any(entry.second.elements[1:])
    ]


def tensors(output: Any) -> list[Tensor]:
    """Every tensor in a model's output, which may nest mappings, sequences and dataclasses of them."""
    leaves, _ = torch.utils._pytree.tree_flatten(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

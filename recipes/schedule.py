"""How weights are updated: optimizer, learning rate over a run, average of the weights. It knows no data."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lnpu_torch.recipes.settings import TrainConfig

RISE, START, END = 0.3, 1 / 25, 1 / 25e4
"""One cycle: the share of a run in which the rate rises, and the first and last rates over the largest, as in torch's
OneCycleLR. (That one could not go on with another number of steps.)"""


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD with Nesterov's momentum, or plain SGD where momentum is 0."""
    momentum, decay = config.momentum, config.weight_decay
    return torch.optim.SGD(model.parameters(), config.lr, momentum, weight_decay=decay, nesterov=momentum > 0)


def make_schedule(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int, done: int = 0) -> LambdaLR:
    """The learning rate over all `steps` of a run, `done` of them done: half a cosine down, or up and down once."""
    for group in optimizer.param_groups:
        group["initial_lr"] = config.lr
    share = cosine if config.schedule == "cosine" else one_cycle
    return LambdaLR(optimizer, lambda step: share(step / steps), last_epoch=done - 1)


def cosine(progress: float) -> float:
    """The rate over the largest, after that share of a run."""
    return _between(1.0, 0.0, progress)


def one_cycle(progress: float) -> float:
    """The rate over the largest, after that share of a run."""
    if progress < RISE:
        return _between(START, 1.0, progress / RISE)
    return _between(1.0, END, (progress - RISE) / (1 - RISE))


def _between(first: float, last: float, progress: float) -> float:
    """From first to last along half a cosine."""
    return last + (first - last) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def make_average(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """A copy of the model whose weights and statistics are exponential moving averages; None without a decay."""
    return None if decay is None else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

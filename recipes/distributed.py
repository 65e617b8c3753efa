"""The processes that train one model together, by accelerate: alone, or as ranks. It knows no model and no data."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from lnpu_torch.files import ConfigError
from lnpu_torch.recipes.settings import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")


def start(config: TrainConfig) -> Accelerator:
    """This process's accelerator; under `torchrun` or `accelerate launch`, one of several.

    Its scaler is there whenever layers are emulated: the chip's errors are FP16, on a CPU too.

    Raises:
        ConfigError: accelerate is missing, or there is no such device.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import GradientAccumulationPlugin
    except ImportError:
        raise ConfigError("training needs accelerate: pip install 'lnpu-torch[recipes]'") from None
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: torch sees no CUDA GPU here; device=cpu or device=auto")
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    pieces = GradientAccumulationPlugin(num_steps=config.accumulate, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision="no", gradient_accumulation_plugin=pieces)
    if config.emulated or config.amp:
        accelerator.scaler = torch.amp.GradScaler(accelerator.device.type)
    if config.threads:
        torch.set_num_threads(config.threads)
    return accelerator


def add_gradients(network: nn.Module) -> None:
    """Let the ranks' gradients be added, where DDP would average them.

    So a loss over the images of all ranks has the errors that one process would have, bit for bit: their size matters
    to a chip that rounds them.
    """
    if isinstance(network, nn.parallel.DistributedDataParallel):
        network.register_comm_hook(None, lambda _, bucket: _added(bucket.buffer()))


def _added(gradients: Tensor) -> torch.futures.Future[Tensor]:
    work = dist.all_reduce(gradients, async_op=True)
    assert work is not None  # it is for ranks outside of the group
    done: torch.futures.Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
    return done


def once(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """The first process calls the function; its result, or the ConfigError that it raises, is every process's."""
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except ConfigError as error:
            outcome[1] = str(error)
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ConfigError(outcome[1])
    result: Result = outcome[0]
    return result


def gather(part: Result) -> list[Result]:
    """Every process's part, in their order, on every process."""
    from accelerate.utils import gather_object

    parts: list[Result] = gather_object([part])
    return parts


def share_buffers(model: nn.Module) -> None:
    """Give every rank the first one's buffers: batch norm's statistics, each rank's own until DDP's next forward."""
    if dist.is_available() and dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)

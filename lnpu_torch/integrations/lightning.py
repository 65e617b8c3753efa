"""LNPU as a callback of Lightning's Trainer. `CostLog` does the work."""

from __future__ import annotations

from typing import Any

import lnpu_torch as lnpu
from lnpu_torch.integrations.cost_log import CostLog

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError as error:
    needs = "lnpu_torch.integrations.lightning needs Lightning: pip install 'lnpu-torch[integrations]'"
    raise ModuleNotFoundError(needs, name=error.name) from error


class LnpuCallback(Callback):
    """Trains the module on the chip's arithmetic, logs each epoch's energy and shares, and writes the run's folder.

    The arguments are those of `CostLog`. The module is converted in place before training begins, with the layers that
    it makes in its `setup` or `configure_model`, and stays so. Thresholds are in the Trainer's checkpoints.
    Validation is not counted. Logged are `CHIP_energy_pj`, `zero_share` and `fp8_share`, summed over ranks.
    `costs.finish()`'s reports are in `reports` after the fit.
    """

    def __init__(self, precision: Any = "fgmp", **settings: Any) -> None:
        self.costs = CostLog(precision, **settings)
        self.reports: list[lnpu.Report] = []
        self._module: LightningModule | None = None
        self._thresholds: dict[str, Any] | None = None  # of a checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":  # the module's own setup and configure_model, which may shard it, come after this
            self.costs.convert(pl_module, complete=False)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.costs.convert(pl_module)
        self._module = pl_module

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._thresholds is not None:
            lnpu.load_thresholds(pl_module, self._thresholds)
        self.costs.start(resumed=trainer.global_step > 0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.costs.begin_epoch()

    def on_train_batch_end(self, *_: Any) -> None:
        self.costs.step_done()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.training or trainer.validating:
            self.costs.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.costs.go_on()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log_dict(self.costs.end_epoch(trainer.current_epoch + 1))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.reports = self.costs.finish()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.costs.close()

    def state_dict(self) -> dict[str, Any]:
        return {"thresholds": lnpu.thresholds(self._module)} if self._module else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._thresholds = state_dict.get("thresholds")

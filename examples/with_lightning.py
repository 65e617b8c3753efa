"""Lightning's own demo, trained as on the chip: one callback more. Run it: python examples/with_lightning.py"""

from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from lnpu_torch.integrations.lightning import LnpuCallback

cost = LnpuCallback("fgmp", chips=["lnpu", "dense-fp16"], folder="lnpu_run")
trainer = Trainer(max_epochs=2, callbacks=[cost], enable_progress_bar=False, logger=False)
trainer.fit(BoringModel(), BoringDataModule())
print(trainer.callback_metrics)
print(cost.reports[0].by("layer"))

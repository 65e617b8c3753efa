"""A small ViT in Hugging Face's Trainer, as on the chip: one callback more. Run it as a script."""

import torch
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from lnpu_torch.integrations.transformers import LnpuCallback

config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32)
images = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 2} for i in range(16)]
cost = LnpuCallback("fgmp", chips=["lnpu", "dense-fp16"], folder="lnpu_run")
args = TrainingArguments("checkpoints", num_train_epochs=2, disable_tqdm=True, report_to="none", use_cpu=True)
trainer = Trainer(ViTForImageClassification(config), args, train_dataset=images, callbacks=[cost])
trainer.train()
print(cost.reports[0].by("layer"))

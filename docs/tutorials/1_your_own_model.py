# %% [markdown]
# # 1. Your own model
#
# Take a model and a training loop, add three lines, and read what the training costs on the chip.
#
# ```text
#  your model ── lnpu.convert ──> the same model, its products in FP8 and FP16
#                                      │  your training loop, as it is
#                                 CostCounter ──> counts: multiplications, zeros, memory
#                                      │
#                     a chip ──> report: energy, time, traffic, by layer and step
# ```
#
# You need `pip install '.[recipes,plot]'`. All of it takes some seconds on one core;
# the first time, loops for the CPU are compiled, which takes up to a minute.

# %%
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import lnpu_torch as lnpu

images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16  # 1,797 scans of digits: 1,500 to train, 297 to test


class Net(nn.Module):
    """Any model: it knows nothing of lnpu_torch."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv2, self.head = nn.Conv2d(16, 32, 3, padding=1), nn.Linear(512, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.head(x.flatten(1))


# %% [markdown]
# ## Convert
#
# `convert` replaces what multiplies, in place. Parameters, `state_dict` keys and hooks stay.
# `"fgmp"` lets each *element* be FP8 or FP16: small ones FP8, the few large ones FP16
# ([in pictures](../fgmp.md)). `coverage` says what stays in float.

# %%
torch.manual_seed(0)
model = lnpu.convert(Net(), "fgmp")
print(lnpu.coverage(model, images[:50]))

# %% [markdown]
# ## Train, and count
#
# The loop is torch's. What runs inside `CostCounter` is counted: here one epoch at a time.

# %%
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
for epoch in range(1, 4):
    with lnpu.CostCounter(model) as cost:
        for batch in torch.randperm(1500).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        right = (model.eval()(images[1500:]).argmax(1) == labels[1500:]).float().mean()
        model.train()
    total = cost.report("lnpu").total
    print(f"epoch {epoch}: test accuracy {right:.1%}, {total.all_energy_pj / 1e9:.2f} mJ, zeros {total.zero_share:.0%}")

# %% [markdown]
# ## Read the table
#
# A training step multiplies three times in every layer. The chip's papers abbreviate the three:
#
# | step | papers | multiplies | and gives |
# | --- | --- | --- | --- |
# | `forward` | FF | input x weight | the layer's output |
# | `grad_input` | EP | error x weight | the error of the layer before |
# | `grad_weight` | WG | input x error | the weight's gradient |
#
# `backward` and `update` are the rest: normalisation and the like on their way back, and the optimizer.

# %%
report = cost.report("lnpu")
print(report.by("step"))

# %% [markdown]
# Three tables, from left to right:
#
# - **Multiplications.** A *MAC* is one multiplication and one addition.
#   `executed + skipped + padding + not run = MACs` in every row. *Skipped* had a zero in the operand that the step
#   streams, the input or the error. *Padding* lies outside the image. *Not run* is the gradient of the images, which
#   nobody asks for. *FP8* is the share of the streamed non-zeros that is FP8.
# - **Vector operations.** All that is no MAC: normalisation, activation, pooling, loss, optimizer.
# - **Energy.** MACs, on-chip memory (SRAM), vector operations (SIMD), what flows while multipliers wait (idle); their
#   sum, *chip*; and *DRAM*, which is outside the chip.
#
# This page shows `report` as a notebook does; `print` in a terminal shows the same as text.
#
# The lines below the tables say what the figures rest on.
#
# Where does it go? Layer by layer:

# %%
rows = report.by("layer").rows
parts = ("mac", "sram", "simd", "idle", "dram")
figure = Figure(figsize=(7, 2.6), layout="constrained")
axes = figure.subplots()
left = [0.0] * len(rows)
for part in parts:
    width = [(getattr(row, f"{part}_energy_pj") or 0) / 1e9 for row in rows]
    axes.barh([row.layer for row in rows], width, left=left, label=part)
    left = [a + b for a, b in zip(left, width, strict=True)]
axes.invert_yaxis()
axes.set_xlabel("energy of an epoch, mJ")
axes.legend(frameon=False, ncols=5, loc="lower left", bbox_to_anchor=(0, 1))
axes.spines[["top", "right"]].set_visible(False)
figure.savefig("where_it_goes.svg")

# %% [markdown]
# In a network this small DRAM takes most: in each step the weights and the optimizer's states of them come and go,
# and batch norm reads its tensors again. TFLOPS/W is without DRAM, as in the papers.
#
# ## Keep it
#
# Counts have no chip in them. Saved, they can be priced on any chip later, without the model.

# %%
cost.save("epoch3.json")  # lnpu price epoch3.json --chip lnpu --chip dense-fp16
torch.save({"model": model.state_dict(), "thresholds": lnpu.thresholds(model)}, "model.pt")
lnpu.revert(model)  # torch's own layers again, with the weights that were trained
print(type(model.conv1))

# %% [markdown]
# Next: [2. The precision it needs](2_the_precision_it_needs.md)

# %% [markdown]
# # 3. Chips
#
# Count once, then ask any number of chips what it would have cost, yours included.
#
# ```text
#              ┌──> lnpu             FP8 and FP16, skips zeros in all three steps
#  counts ─────┼──> dense-fp16       FP16, skips nothing
#  (one run)   ├──> 17 published chips, such as redmule, trainer, h100
#              └──> your own YAML file
# ```

# %%
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import lnpu_torch as lnpu

images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16
torch.manual_seed(0)
first = nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()
second = nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
model = lnpu.convert(nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64, 10)), "fgmp")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
with lnpu.CostCounter(model) as cost:
    for batch in torch.randperm(1500).split(50):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
counts = cost.counts  # counts.save("epoch.json"): `lnpu price epoch.json --chip ...` does what follows

# %% [markdown]
# ## Compare
#
# Four built-in chips share LNPU's circuits and differ in what they can do, so that each idea can be seen alone.
# Energies are an epoch's. *chip* is what the papers compare; *+ DRAM* is what a battery feels.


# %%
def compared(names):
    first = None
    print(f"{'chip':<18}{'MACs':>8}{'chip':>8}{'+ DRAM, mJ':>12}{'time, ms':>10}{'over the first':>16}")
    for name in names:
        report = lnpu.price(counts, name)
        total = report.total
        first = first or total
        energies = [each / 1e9 for each in (total.mac_energy_pj, total.energy_pj, total.all_energy_pj)]
        numbers = "{:>8.2f}{:>8.2f}{:>12.2f}".format(*energies)
        ratio = total.energy_pj / first.energy_pj
        print(f"{report.chip:<18}{numbers}{report.time_s * 1e3:>10.1f}{ratio:>15.2f}x")


compared(["lnpu", "lnpu-fp16", "sparse-inference", "dense-fp16"])

# %% [markdown]
# `lnpu-fp16` has no FP8; `sparse-inference` skips zeros in the forward step only; `dense-fp16` has neither idea.
#
# ## Where a chip's numbers are from
#
# Every constant has a tag, *published*, *derived* or *assumed*, and a source: `print(lnpu.chip("lnpu"))`, or
# `lnpu chips lnpu`. Few are published, so ask how much an answer depends on them:

# %%
print(lnpu.sensitivity(counts, ["lnpu", "dense-fp16"]))

# %% [markdown]
# ## Write your own
#
# A YAML file says what it is `like`, and what differs, with tag and source.

# %%
Path("wide.yaml").write_text("""
like: lnpu
description: LNPU with four times the lanes and twice the SRAM
lanes: {count: {value: 64, tag: assumed, source: four times LNPU's}}
macs_per_cycle:
  fp8: {value: 6144, tag: assumed, source: 64 lanes}
  fp16: {value: 3072, tag: assumed, source: 64 lanes}
sram_bytes: {value: 761856, tag: assumed, source: twice LNPU's 372 KB}
""")
compared(["lnpu", "wide.yaml"])

# %% [markdown]
# Four times the lanes are not four times as fast: lanes wait for the fullest of them, and layers are narrow.
#
# ## Sweep
#
# Which SRAM, at which voltage? A sweep prices all combinations; a \* marks those that no other beats in both energy
# and time.

# %%
sizes, voltages = [93 << 10, 186 << 10, 372 << 10, 744 << 10], [0.78, 0.9, 1.1]
swept = lnpu.sweep(counts, ["lnpu"], {"sram_bytes": sizes, "operating_point.voltage_v": voltages})
print(swept)

# %%
figure = Figure(figsize=(5, 3), layout="constrained")
axes = figure.subplots()
for size in sizes:
    points = [point for point in swept.points if point.values["sram_bytes"] == size]
    label = f"{size >> 10} KB"
    axes.plot([point.time_s * 1e3 for point in points], [point.energy_pj / 1e9 for point in points], "o-", label=label)
axes.set(xlabel="time of an epoch, ms", ylabel="energy of chip and DRAM, mJ", xlim=(0, None), ylim=(0, None))
axes.legend(title="SRAM", frameon=False)
axes.spines[["top", "right"]].set_visible(False)
figure.savefig("sweep.svg")

# %% [markdown]
# Each line goes from 0.78 V at the right to 1.1 V at the left.
#
# More: [all keys of a chip](../constants.md), [published chips beside their own figures](../chips.md),
# [how pricing works](../cost.md).
#
# Next: [4. Sparse training](4_sparse_training.md)

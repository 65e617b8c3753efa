# %% [markdown]
# # 2. The precision it needs
#
# Less FP16 is cheaper; too little of it hurts training. Find out how much your network needs.
#
# ![Values that FGMP can have around its threshold, and close to zero](../images/number_lines.svg)
#
# *FGMP: each tensor has a threshold tau (here 3). Elements below it are FP8, those above FP16.
# The lower tau is, the more FP16.*
#
# Who chooses tau? A `Rule`, anew in each step, in one of three ways:
#
# | | |
# | --- | --- |
# | `Rule(max_error=0.013)` | as little FP16 as keeps a tensor's relative RMS error below this; `"fgmp"` |
# | `Rule(fp16_share=0.1)` | at most this share of the elements is FP16 |
# | `Rule(threshold=6)` | tau is fixed, here 3: 6 = 4 e + k gives 2^e (1 + k / 4) ([more](../numerics.md)) |

# %%
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import lnpu_torch as lnpu

images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16


def network():
    torch.manual_seed(0)
    first = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
    second = nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(256, 10))


# %% [markdown]
# ## Before training: the gradient
#
# The quickest test costs one step: how far is the gradient from float32's? The direction of the update is what
# training lives on.


# %%
def gradient(model, scale=1.0):
    """All weights' gradients on 200 images, in a row; the loss is scaled, and the gradient scaled back."""
    model.zero_grad()
    (scale * F.cross_entropy(model(images[:200]), labels[:200])).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]) / scale


def error(rule, scale=1.0):
    return ((gradient(lnpu.convert(network(), rule), scale) - exact).norm() / exact.norm()).item()


exact = gradient(network())
rules = {
    "fp8": lnpu.Rule(fp16_share=0),
    "error <= 0.02": lnpu.Rule(max_error=0.02),
    "fgmp, 0.013": lnpu.Rule(max_error=0.013),
    "error <= 0.005": lnpu.Rule(max_error=0.005),
    "fp16": lnpu.Rule(fp16_share=1),
}
errors = {name: error(rule) for name, rule in rules.items()}
for name, value in errors.items():
    print(f"{name:<15} gradient off by {value:.2%}")

# %% [markdown]
# ## Scale the loss
#
# The errors that flow back are FP8 and FP16, too. Where they are smaller than the formats reach they become zero, and
# nothing is learned. Multiply the loss, and divide the gradient: `torch.amp.GradScaler` does it, as in any mixed
# precision, and `lnpu train` does it by itself.

# %%
for scale in (2**-16, 2**-8, 1, 2**8):
    print(f"loss times {scale:<12g} gradient off by {error('fgmp', scale):.2%}")

# %% [markdown]
# ## By training
#
# The gradient says what a step does, training what comes of it. Two epochs each; the energy is the chip's.


# %%
def trained(model, epochs=2):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for batch in torch.randperm(1500).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad(), lnpu.no_count(model):
        return (model.eval()(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()


print(f"{'float32':<15} accuracy {trained(network()):.1%}")
energies = {}
for name, rule in rules.items():
    model = lnpu.convert(network(), rule)
    with lnpu.CostCounter(model, vector_ops=False) as cost:
        right = trained(model)
    total = cost.report("lnpu").total
    energies[name] = total.energy_pj / 1e9
    print(f"{name:<15} accuracy {right:.1%}, FP16 {1 - total.fp8_share:>6.1%}, {energies[name]:.3f} mJ")

# %%
figure = Figure(figsize=(5, 3), layout="constrained")
axes = figure.subplots()
axes.plot(list(energies.values()), [100 * errors[name] for name in energies], "o-", color="#0B7A75")
for name, energy in energies.items():
    axes.annotate(f" {name}", (energy, 100 * errors[name]), va="bottom")
axes.set(xlabel="energy of training on the chip, mJ", ylabel="gradient off by, %", ylim=(0, None))
axes.spines[["top", "right"]].set_visible(False)
axes.margins(x=0.2)
figure.savefig("error_and_energy.svg")

# %% [markdown]
# One of the 297 test images is 0.3 %, so all of these learn about alike, and one seed cannot tell them apart.
# [An example](../examples.md#find-the-fp16-share-that-your-network-needs) has more seeds, and
# [results](../results.md) larger networks on harder data.
#
# ## Layer by layer
#
# Often one layer needs it: the first, or the last. `overrides` takes names or patterns; `None` leaves a layer in float.

# %%
for overrides in ({}, {"0": "fp16"}, {"8": "fp16"}, {"0": "fp16", "8": "fp16"}):
    model = lnpu.convert(network(), rules["fp8"], overrides=overrides)
    off = (gradient(model) - exact).norm() / exact.norm()
    print(f"{', '.join(overrides) or 'none'} in FP16, all else in FP8: gradient off by {off:.2%}")

# %% [markdown]
# Single operands of single steps, other formats (E5M2, BF16) and stochastic rounding:
# [Rounding and counting](../numerics.md). Yours goes into a YAML file, for `lnpu.convert(model, "mine.yaml")` and
# `lnpu train ... precision=mine.yaml`.
#
# Next: [3. Chips](3_chips.md)

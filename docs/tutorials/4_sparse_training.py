# %% [markdown]
# # 4. Sparse training
#
# Zeros come from ReLU, from errors that it lets through or not, from rounding, and from weights that you prune.
# Which of them save energy depends on the chip.
#
# ![The streamed operands of a small layer, and what their zeros let each step skip](../images/skipping.svg)
#
# *LNPU streams one operand in each step, and skips its zeros: an input in `forward` and `grad_weight`, an error in
# `grad_input`. A zero weight is in neither.*

# %%
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import lnpu_torch as lnpu

images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
images = images.float().view(-1, 1, 8, 8) / 16


def network(activation=nn.ReLU, norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    first = nn.Conv2d(1, 16, 3, padding=1), norm(16), activation()
    second = nn.Conv2d(16, 32, 3, padding=1), norm(32), activation(), nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(128, 10))


def masks_of(model, sparsity):
    """Which weights stay: the largest of each layer."""
    weights = [layer.weight for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)]
    return [(weight, weight.abs() > weight.detach().abs().quantile(sparsity)) for weight in weights]


def trained(model, sparsity=0.0, epochs=3):
    """Train, with pruned weights from the second epoch on; returns the last epoch's counts, and the accuracy."""
    lnpu.convert(model, "fgmp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    masks = []
    for epoch in range(epochs):
        if epoch == 1 and sparsity:
            masks = masks_of(model, sparsity)
        with lnpu.CostCounter(model) as cost:
            for batch in torch.randperm(1500).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
                with torch.no_grad():
                    for weight, mask in masks:
                        weight.mul_(mask)
    with torch.no_grad(), lnpu.no_count(model):
        return cost.counts, (model.eval()(images[1500:]).argmax(1) == labels[1500:]).float().mean().item()


# %% [markdown]
# ## Zeros that come by themselves
#
# Batch norm fills the gaps that ReLU leaves in errors; GELU leaves none to fill. (Without batch norm this network
# would need more than three epochs.)

# %%
variants = {
    "ReLU": network(),
    "ReLU, no batch norm": network(norm=nn.Identity),
    "GELU": network(nn.GELU),
}
runs, shares = {}, {}
for name, model in variants.items():
    counts, right = runs[name] = trained(model)
    report = lnpu.price(counts, "lnpu")
    shares[name] = {row.step: row.zero_share for row in report.of_layers().by("step").rows}
    print(f"{name:<20} accuracy {right:.1%}, {report.total.mac_energy_pj / 1e9:.3f} mJ for MACs", end="; zeros: ")
    print(", ".join(f"{step} {share:.0%}" for step, share in shares[name].items()))

# %%
figure = Figure(figsize=(6, 2.6), layout="constrained")
axes = figure.subplots()
for place, (name, by_step) in enumerate(shares.items()):
    axes.bar([at + 0.27 * place for at in range(3)], [100 * by_step[step] for step in by_step], 0.25, label=name)
axes.set_xticks([0.27, 1.27, 2.27], list(shares["ReLU"]))
axes.set(ylabel="zeros of the streamed operand, %", ylim=(0, 100))
axes.legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
axes.spines[["top", "right"]].set_visible(False)
figure.savefig("zeros_by_step.svg")

# %% [markdown]
# ## Zeros that you make
#
# Prune 60 % of the weights after the first epoch, and train on. LNPU does not skip a zero weight. A chip that skips
# zeros of both operands does, and so the same counts are priced on one: LNPU with another `skip`.

# %%
dense, dense_right = runs["ReLU"]
pruned, pruned_right = trained(network(), sparsity=0.6)
both = {f"skip.{step}": "both" for step in ("forward", "grad_input", "grad_weight")}
chips = {"lnpu": lnpu.chip("lnpu"), "skips both": lnpu.chip("lnpu").with_values(both)}
print(f"accuracy {dense_right:.1%} dense, {pruned_right:.1%} pruned\n")
for name, chip in chips.items():
    for what, counts in (("dense", dense), ("pruned", pruned)):
        total = lnpu.price(counts, chip).of_layers().total
        print(f"{what:<7} on {name:<11} {total.executed / 1e6:>6.1f} M MACs, {total.mac_energy_pj / 1e9:.3f} mJ")

# %% [markdown]
# On LNPU pruned weights save nothing here. Only MACs are compared: how lanes that skip both would wait, and what their
# control would take, no source tells. [Published chips](../chips.md) that skip both: `pnpu`, `tsunami`, `trainer` and
# `sigma`.
#
# ## What if, without training
#
# How much would more sparsity bring? `with_sparsity` takes a run's counts, and sets densities as if zeros were random.
# Held against the pruned run itself:

# %%
guess = dense.with_sparsity({"default": {"weight": 0.4}})
for what, counts in (("estimated", guess), ("trained", pruned)):
    total = lnpu.price(counts, chips["skips both"]).of_layers().total
    print(f"{what:<10} {total.executed / 1e6:>6.1f} M MACs, {total.mac_energy_pj / 1e9:.3f} mJ")

# %% [markdown]
# The difference is what training does to the *other* operand once weights are gone: no density of the weights tells
# that. [What if](../what_if.md) says by how much estimates err.
#
# Next: a whole run as one command, with a page of its own: [recipes](../recipes.md). Your training loop in Lightning or
# Hugging Face: [integrations](../integrations.md). Words and numbers to look up: [cheat sheet](../cheat_sheet.md).

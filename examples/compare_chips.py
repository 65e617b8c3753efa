"""One epoch, counted once and priced on several chips, one of them your own. Run it: python examples/compare_chips.py

Handwritten digits that scikit-learn ships with (pip install 'lnpu-torch[recipes]'); a quarter of a minute on one core.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import lnpu_torch as lnpu

IMAGES, LABELS = map(torch.from_numpy, load_digits(return_X_y=True))
IMAGES = IMAGES.float().view(-1, 1, 8, 8) / 16


def network() -> nn.Module:
    first = nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()
    second = nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64, 10))


def counted_epoch(images: int) -> lnpu.Counts:
    """What an epoch does, on whatever chip: MACs, zeros, groups, lanes."""
    torch.manual_seed(0)
    model = lnpu.convert(network(), "fgmp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with lnpu.CostCounter(model) as cost:
        for batch in torch.randperm(images).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(IMAGES[batch]), LABELS[batch]).backward()
            optimizer.step()
    return cost.counts


def line(name: str, report: lnpu.Report) -> str:
    total = report.total
    parts = total.mac_energy_pj, total.sram_energy_pj, total.simd_energy_pj, total.idle_energy_pj, total.dram_energy_pj
    cells = "".join(f"{energy / 1e9:>9.3f}" for energy in parts)
    return f"{name:<17}{cells}{report.mac_time_s * 1e3:>13.2f}{report.time_s * 1e3:>8.2f}"


def main(images: int = 1500) -> None:
    counts = counted_epoch(images)  # counts.save("epoch.json"), and `lnpu price epoch.json --chip ...` does the rest
    four_times = lnpu.chip("lnpu").with_values(
        {"lanes.count": 64, "macs_per_cycle.fp8": 6144, "macs_per_cycle.fp16": 3072}
    )
    chips = {name: lnpu.chip(name) for name in ("lnpu", "lnpu-fp16", "sparse-inference", "dense-fp16")}
    reports = {name: lnpu.price(counts, chip) for name, chip in {**chips, "4 x the lanes": four_times}.items()}

    print("                        energy, mJ                                   time, ms")
    print("chip                  MAC     SRAM     SIMD     idle     DRAM  multipliers     all")
    for name, report in reports.items():
        print(line(name, report))

    ours, theirs = (reports[name].of_layers().total.energy_pj for name in ("lnpu", "dense-fp16"))
    print(f"\nOn the chip, the layers' steps cost {theirs / ours:.2f} times as much on dense-fp16 as on lnpu.")
    print("\nWhere lnpu's energy goes, layer by layer:")
    for row in reports["lnpu"].by("layer").rows:
        print(f"  {row.layer:<16}{row.energy_pj / 1e9:>8.3f} mJ")


if __name__ == "__main__":
    main()

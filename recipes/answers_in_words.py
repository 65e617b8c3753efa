"""What our runs say to claims that come without a figure. It knows no published one."""

from __future__ import annotations

import lnpu_torch as lnpu
from lnpu_torch.recipes.claim_results import Answer
from lnpu_torch.recipes.measurements import STEPS, Evidence, each, energy, fp8_shares, layers, mean, zero_shares


def fp8_is_enough(runs: Evidence) -> Answer:
    shares = {name: mean(fp8_shares(layers(probe.fgmp)).values()) for name, probe in runs.probes.items()}
    why = (
        "Streamed non-zeros whose FP8 value our rule finds good enough, mean of the steps. What is good enough is our "
        "choice, a relative RMS error of 0.013 per tensor."
    )
    return Answer(None, "assumed", why, each(shares, "{:.0%}"))


def ratio_adjusts(runs: Evidence) -> Answer:
    shares = {
        name: [mean(fp8_shares(layers(counts)).values()) for counts in (probe.first, probe.fgmp)]
        for name, probe in runs.probes.items()
    }
    text = each({name: f"{first:.0%} to {last:.0%}" for name, (first, last) in shares.items()})
    why = (
        "FP8 share of the streamed non-zeros, from the first step to the last ones. Every element is one or the other "
        "by a threshold per tensor, which each step sets anew; how the chip sets its ratio no source tells."
    )
    return Answer(None, "held out", why, text)


def all_steps_skip(runs: Evidence) -> Answer:
    skipped = {
        short: mean(_skipped(probe.fgmp, step) for probe in runs.probes.values()) for step, short in STEPS.items()
    }
    added = {
        short: mean(
            100 * (zero_shares(layers(probe.fgmp))[step] - zero_shares(layers(probe.fp16))[step])
            for probe in runs.probes.values()
        )
        for step, short in STEPS.items()
    }
    why = (
        "MACs inside the image that are skipped, mean of the networks. The zeros are ReLU's, pooling's and dropout's: "
        f"FP8 in place of binary16 changes their share by {each(added, '{:+.1f}')} points, so FGMP makes next to none. "
        "The thesis has it make zeros too: our FP8 has subnormals and reaches 17 binades below the threshold; one that "
        "ends sooner makes more (below, where it was counted)."
    )
    return Answer(None, "held out", why, each(skipped, "{:.0%}"))


def _skipped(counts: lnpu.Counts, step: str) -> float:
    row = next(row for row in layers(counts).by("step").rows if row.step == step)
    executed, skipped = int(row.executed), int(row.skipped)
    return skipped / (executed + skipped)


def earlier_chips(runs: Evidence) -> Answer:
    ratios = {
        chip: mean(energy(probe.fp16, chip) / energy(probe.fgmp) for probe in runs.probes.values())
        for chip in ("sparse-inference", "dense-fp16")
    }
    why = (
        "Energy of the layers' steps over ours, mean of the networks. Both are LNPU's own multipliers that skip less, "
        "as the abstract describes those chips; their silicon is not modelled."
    )
    return Answer(None, "assumed", why, each(ratios, "{:.2f}x"))


def layers_and_balancer(runs: Evidence) -> Answer:
    totals = [layers(probe.fgmp).total for probe in runs.probes.values()]
    with_it, without = (
        mean(getattr(total, name) or 0.0 for total in totals) for name in ("utilisation", "unbalanced_utilisation")
    )
    kinds = sorted({entry.kind for probe in runs.probes.values() for entry in probe.fgmp.steps})
    why = (
        f"Lanes that work rather than wait, with the balancer and without, mean of the networks; layers: "
        f"{', '.join(kinds)}. Inference is FF alone. How many lanes share their work, and after how many positions "
        "they wait, is our choice."
    )
    return Answer(None, "assumed", why, f"lanes busy {with_it:.0%}, without {without:.0%}")

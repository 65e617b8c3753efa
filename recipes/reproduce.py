"""Every claim about the chip beside what our own runs say: published, ours, the difference, and why.

lnpu reproduce                                             # scikit-learn's digits, minutes on a CPU
lnpu reproduce --data cifar10.npz --markdown reproduction.md
lnpu reproduce --full                                      # torchvision's networks at 224 x 224 pixels
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from lnpu_torch.recipes import answers_in_words, claim_results
from lnpu_torch.recipes.claim_results import Answer, Basis
from lnpu_torch.recipes.claims import Claims, Tag, read_claims
from lnpu_torch.recipes.measurements import Evidence
from lnpu_torch.recipes.short_training import Settings, open_images, probe_all
from lnpu_torch.recipes.sparsity_curve import curves

ANSWERS: dict[str, Callable[[Evidence], Answer]] = {
    "peak_efficiency": claim_results.peak_efficiency,
    "dense_efficiency": claim_results.dense_efficiency,
    "dense_power": claim_results.dense_power,
    "zeros_vgg16": claim_results.zeros("vgg16"),
    "zeros_alexnet": claim_results.zeros("alexnet"),
    "zeros_resnet18": claim_results.zeros("resnet18"),
    "fgmp_over_sparse_fp16": claim_results.fgmp_over_sparse_fp16,
    "accuracy": claim_results.accuracy,
    "memory_access": claim_results.memory_access,
    "resnet18_efficiency": claim_results.resnet18_efficiency,
    "fp8_share": claim_results.fp8_share,
    "fp8_energy": claim_results.fp8_energy,
    "over_v100": claim_results.over_v100,
    "over_earlier_chip": claim_results.over_earlier_chip,
    "fp8_is_enough": answers_in_words.fp8_is_enough,
    "ratio_adjusts": answers_in_words.ratio_adjusts,
    "all_steps_skip": answers_in_words.all_steps_skip,
    "earlier_chips": answers_in_words.earlier_chips,
    "layers_and_balancer": answers_in_words.layers_and_balancer,
}


@dataclass(frozen=True)
class Row:
    """One claim: what a source says, what our runs say in the same unit (None where they have words), and why."""

    key: str
    what: str
    published: str
    tag: Tag
    source: str
    ours: float | None
    ours_text: str
    difference: str
    basis: Basis
    why: str


def reproduce(settings: Settings, say: Callable[[str], None]) -> tuple[tuple[Row, ...], Evidence]:
    """Run everything that the claims need; `say` is told what runs. Raises ConfigError for wrong settings."""
    claims = read_claims()
    images = open_images(settings)
    probes = probe_all(settings, images, say)
    say("one layer at 0 ... 90 % zeros")
    drawn = curves(settings.curve, settings.seed)
    evidence = Evidence(probes, drawn, str(images))
    return rows(claims, evidence), evidence


def rows(claims: Claims, evidence: Evidence) -> tuple[Row, ...]:
    """One row for each claim, in the file's order."""
    return tuple(_row(key, claims, ANSWERS[key](evidence)) for key in claims.claims)


def _row(key: str, claims: Claims, answer: Answer) -> Row:
    claim = claims.claims[key]
    differs = "-" if answer.ours is None else claim.difference(answer.ours)
    text = answer.text if answer.ours is None else claim.ours(answer.ours)
    source = (claim.what, claim.text, claim.tag, claim.source)
    text, why = (re.sub(r"(?<=\d)%", " %", words) for words in (text, answer.why))  # as the claims are written
    return Row(key, *source, answer.ours, text, differs, answer.basis, why)

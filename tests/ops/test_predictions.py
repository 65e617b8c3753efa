"""Predictions of an element's error against elements that are rounded, and sums of them over many ranks."""

import pytest
import torch

from helpers.tensors import scalar
from lnpu_torch.ops.quantize.reference import (
    RANGE,
    SAMPLE,
    UNSET,
    choose_by_histogram,
    error_table,
    histogram,
    quantize,
    tau,
)
from lnpu_torch.quant.precision import Rule


@pytest.mark.parametrize("rule", [Rule(), Rule(low="e5m2"), Rule(high="e6m9")], ids=str)
@pytest.mark.parametrize("t", [0, 3, 9])
def test_predictions_are_what_elements_of_a_quarter_binade_come_to(rule, t):
    """Where a quarter-binade has whole steps of its format, whose numbers err evenly by up to half a step."""
    smallest, unit = rule.threshold_range[0], 4 - RANGE
    error, signal = (4.0**unit / 48 * table.double() for table in error_table(rule, torch.tensor(unit)))
    tried = 0
    for quarter in range(t - 6, t + 6):
        low, high = (tau(scalar(end), torch.float64) for end in (quarter, quarter + 1))
        x = low + (high - low) * (torch.arange(2**12) + 0.5) / 2**12
        place = quarter - smallest + 1
        assert signal[place].item() == pytest.approx(x.square().mean().item(), rel=1e-6)
        values = quantize(x, rule, scalar(t))[0]
        if values.diff().unique().numel() == 2 and low.item() in values and high.item() in values:
            tried += 1
            assert error[t - smallest, place].item() == pytest.approx((values - x).square().mean().item(), rel=1e-2)
    assert tried >= 6


def test_the_choice_of_1024_ranks_is_that_of_one_that_saw_as_much():
    """Alike histograms from each: sums must not overflow. A coarser unit may move T to its neighbour."""
    for scale in (1.0, 2.0**14, 2.0**-20):
        x = torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0)) * scale
        counts, fallback = histogram(x, Rule()), scalar(UNSET)
        one, all_ranks = (choose_by_histogram(counts * ranks, Rule(), fallback) for ranks in (1, 1024))
        assert abs(one - all_ranks) <= 1

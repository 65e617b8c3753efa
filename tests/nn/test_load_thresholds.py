"""What `load_thresholds` takes, and what it refuses."""

import pytest
import torch
from torch import nn

import lnpu_torch as lnpu
from lnpu_torch.files import ConfigError
from lnpu_torch.ops.quantize.reference import UNSET

WHOLE = (6, 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(WHOLE), "whole numbers"),
        (torch.zeros(WHOLE, dtype=torch.bool), "whole numbers"),
        (torch.zeros(6, dtype=torch.int32), r"expected a tensor \[6, 2\], got \[6\]"),
        (torch.zeros(1, 2, dtype=torch.int32), "expected a tensor"),
        ([[0, 0]] * 6, "got list"),
        (torch.full(WHOLE, 10**6), "1000000 for input in forward is outside -100 ... 63"),
        (torch.full(WHOLE, -(2**31) + 1), "outside"),
        (torch.full(WHOLE, 2**40), "outside"),
        (torch.full(WHOLE, UNSET - 2**33), "outside"),
    ],
)
def test_what_can_be_no_thresholds_is_refused_and_nothing_is_restored(wrong, message):
    model = nn.Sequential(lnpu.nn.Linear(4, 4), lnpu.nn.Linear(4, 4))
    state = lnpu.thresholds(model)
    with pytest.raises(ConfigError, match=f"'1'.*{message}"):
        lnpu.load_thresholds(model, {"0": torch.full(WHOLE, 5), "1": wrong})
    assert all(torch.equal(state[name], found) for name, found in lnpu.thresholds(model).items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_whole_numbers_in_range_are_thresholds(dtype):
    model = lnpu.nn.Linear(4, 4)
    lnpu.load_thresholds(model, {"": torch.tensor([[-100, 63]] * 6, dtype=dtype)})
    assert lnpu.thresholds(model)[""].tolist() == [[-100, 63]] * 6

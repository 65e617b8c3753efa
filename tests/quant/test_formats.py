"""Formats and rounding against ml_dtypes: every encoding, every bf16 and binary16 input, random float32 patterns."""

import ml_dtypes
import numpy as np
import pytest
import torch

from helpers.tensors import all_patterns, identical, random_patterns, scalar
from lnpu_torch.ops.quantize.reference import philox, quantize, random_bits, round_to
from lnpu_torch.quant.formats import FORMATS
from lnpu_torch.quant.precision import Rule

ORACLES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "fp16": np.float16}
THRESHOLDS = (-100, -99, -40, -29, -28, -27, -1, 0, 1, 2, 3, 5, 28, 35, 60, 63)


def cast(x, name, exponent=0):
    """The oracle: x rounded to a format whose exponents are all moved up by `exponent`."""
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (x.numpy() * np.float32(2.0**-exponent)).astype(ORACLES[name]).astype(np.float32)
    return torch.from_numpy(scaled * np.float32(2.0**exponent))


def fgmp_oracle(x, t, low="e4m3"):
    """FGMP from its definition, with someone else's casts."""
    exponent, quarter = t >> 2, t & 3
    top, least = {"e4m3": (8, -7), "e5m2": (15, 7)}[low]
    small = x.abs() < 2.0**exponent * (1 + quarter / 4)
    q = torch.where(small, cast(torch.where(small, x, 0), low, max(exponent, least) - top), cast(x, "fp16"))
    return q, torch.where(q == 0, 0, torch.where(small, 8, 16)).to(torch.uint8)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "fp16"])
def test_format_is_the_oracles(name):
    info, form = ml_dtypes.finfo(ORACLES[name]), FORMATS[name]
    assert (form.max, 2.0**form.min_exponent, 2.0**form.ulp_exponent) == (info.max, info.tiny, info.smallest_subnormal)
    assert form.bits == info.bits


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_every_code_is_kept_and_nothing_else_appears(name):
    codes = torch.from_numpy(np.arange(256, dtype=np.uint8).view(ORACLES[name]).astype(np.float32))
    codes = codes[codes.isfinite()]
    rule, identity = Rule(low=name, high=None), scalar(4 * FORMATS[name].max_exponent + 3)
    assert identical(quantize(codes, rule, identity)[0], codes)
    everything = quantize(all_patterns(torch.bfloat16), rule, identity)[0]
    assert set(everything[everything.isfinite()].tolist()) == set(codes.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("low", ["e4m3", "e5m2"])
@pytest.mark.parametrize("t", THRESHOLDS)
def test_fgmp_over_every_16_bit_input(dtype, low, t):
    x = all_patterns(dtype)
    q, groups = quantize(x, Rule(low=low), scalar(t))
    expected, expected_groups = fgmp_oracle(x, t, low)
    assert identical(q, expected)
    assert torch.equal(groups, expected_groups)


@pytest.mark.parametrize(("high", "window"), [("fp16", 1), ("fp16", 5), ("fp16", 15), ("fp16", 18), (None, 4)])
@pytest.mark.parametrize("t", [-100, -30, 6, 40])
def test_a_window_makes_zeros_of_what_lies_below_it_and_changes_nothing_else(high, window, t):
    x, whole = all_patterns(torch.bfloat16), Rule(high=high)
    plain, classes = quantize(x, whole, scalar(t))
    kept, kept_classes = quantize(x, Rule(high=high, window=window), scalar(t))
    top = max(t // 4, 8 + 9 - 24)  # FP8's largest exponent is 8, its finest step 2^-9, binary16's 2^-24
    in_fp8 = (x.float().abs() < 2.0 ** (t // 4) * (1 + t % 4 / 4)) if high else torch.ones_like(x, dtype=torch.bool)
    below = in_fp8 & (x.float().abs() < 2.0 ** (top + 1 - window))
    assert below.sum() > 2  # more than both zeros
    assert torch.equal(kept.nan_to_num(), torch.where(below, 0, plain).nan_to_num())
    assert torch.equal(torch.signbit(kept), torch.signbit(plain))
    assert torch.equal(kept_classes, torch.where(below, 0, classes))


def test_a_window_is_of_a_low_format_and_no_wider():
    assert Rule(low="e5m2", window=32).window == 32 and Rule(window=18).window == 18
    for fields, message in (({"window": 19}, "e4m3 has 18 binades"), ({"low": None, "window": 3}, "there is no low")):
        with pytest.raises(ValueError, match=message):
            Rule(**fields)


@pytest.mark.parametrize("t", THRESHOLDS)
def test_fgmp_fits_in_binary16(t):
    x = torch.cat([all_patterns(torch.bfloat16), random_patterns(10**5, 1)])
    for low in ("e4m3", "e5m2"):
        q = quantize(x, Rule(low=low), scalar(t))[0]
        assert identical(q.half().float(), q)


@pytest.mark.parametrize("count", [10**6, pytest.param(10**8, marks=pytest.mark.slow)])
def test_random_float32_patterns(count):
    for seed in range(count // 62_500):
        x = random_patterns(62_500, seed)
        t = THRESHOLDS[seed % len(THRESHOLDS)]
        assert identical(quantize(x, Rule(low=None), scalar(0))[0], cast(x, "fp16"))
        assert identical(quantize(x, Rule(), scalar(t))[0], fgmp_oracle(x, t)[0])
        assert identical(quantize(x, Rule(low="e5m2"), scalar(t))[0], fgmp_oracle(x, t, "e5m2")[0])


def test_float64_is_rounded_once():
    # 1 + 2^-11 + 2^-40 lies just above a tie: through float32 it would fall on the tie, and to even
    x = torch.tensor([1 + 2.0**-11 + 2.0**-40], dtype=torch.float64)
    assert quantize(x, Rule(low=None), scalar(0))[0].item() == 1 + 2.0**-10
    wide = torch.from_numpy(np.random.default_rng(0).standard_normal(10**5))
    assert torch.equal(
        quantize(wide, Rule(low=None), scalar(0))[0], torch.from_numpy(wide.numpy().astype(np.float16)).double()
    )


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_uniform_fp8_saturates_and_passes_nan_and_infinity(name):
    rule, top = Rule(low=name, high=None), FORMATS[name].max_exponent
    x = torch.tensor([1e30, -1e30, torch.inf, -torch.inf, torch.nan, -0.0, 1e-30])
    q, groups = quantize(x, rule, scalar(4 * top))
    assert identical(
        q, torch.tensor([FORMATS[name].max, -FORMATS[name].max, torch.inf, -torch.inf, torch.nan, -0.0, 0.0])
    )
    assert groups.tolist() == [8, 8, 8, 8, 8, 0, 0]
    finite = all_patterns(torch.float16)
    finite = finite[finite.abs() <= FORMATS[name].max]
    assert identical(quantize(finite, rule, scalar(4 * top))[0], cast(finite, name))


def test_1_6_9_against_float32_arithmetic():
    x = random_patterns(10**5, 3)
    x = x[x.isfinite() & (x.abs() < FORMATS["e6m9"].max) & (x.abs() > 2.0**-30)]
    magic = 1.5 * 2.0 ** (torch.log2(x.abs().double()).floor() + 14)  # rounds at 2^(e-9) in float32
    expected = ((x.double() + magic).float().double() - magic).float()
    assert torch.equal(round_to(x, FORMATS["e6m9"]), expected)
    edge = torch.tensor([FORMATS["e6m9"].max, 2.0**32, 2.0**-39, 2.0**-40, 3 * 2.0**-40])
    assert round_to(edge, FORMATS["e6m9"]).tolist() == [FORMATS["e6m9"].max, torch.inf, 2.0**-39, 0.0, 2.0**-38]


def test_1_6_9_reaches_below_binary16():
    x = torch.tensor([2.0**-39, 2.0**-35])
    assert torch.equal(quantize(x, Rule(high="e6m9"), scalar(-159))[0], x)


def test_stochastic_rounding_is_unbiased_and_needs_its_bits():
    x = torch.full((2**16,), 1 + 0.3 / 8)  # 0.3 of the way from 1 to the next E4M3 code
    rule = Rule(rounding="stochastic")
    bits = random_bits(x.shape, torch.tensor(7), 0)
    q = quantize(x, rule, scalar(8), bits)[0]
    assert set(q.tolist()) == {1.0, 1.125}
    assert (q == 1.125).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert torch.equal(quantize(x, rule, scalar(8), torch.zeros_like(bits))[0], torch.full_like(x, 1.125))
    assert torch.equal(quantize(q, rule, scalar(8), bits)[0], q)


@pytest.mark.parametrize(("rule", "bits"), [(Rule(), 3), (Rule(low=None), 10), (Rule(high=None), 3)], ids=str)
def test_stochastic_rounding_goes_up_for_exactly_its_share_of_the_random_numbers(rule, bits):
    """From [1, 2), where the share of a step is a whole number of 2^-24; what is exact, share 0, never moves."""
    x = 1 + torch.cat([torch.arange(2**bits) * 2.0**-bits, torch.arange(0, 2**23, 4099) * 2.0**-23])
    below = (x * 2**bits).floor() / 2**bits
    share = ((x - below) * 2.0 ** (bits + 24)).long()
    assert torch.equal(quantize(x, rule, scalar(8), share)[0], below)
    moves = share > 0
    assert torch.equal(quantize(x, rule, scalar(8), share - 1)[0][moves], (below + 2.0**-bits)[moves])


def test_philox_known_answers():
    """Vectors of the generator's authors (Random123, kat_vectors)."""
    words = lambda *values: tuple(torch.tensor(value) for value in values)  # noqa: E731
    ones = 0xFFFFFFFF
    assert [int(w) for w in philox(words(0, 0, 0, 0), words(0, 0))] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [int(w) for w in philox(words(ones, ones, ones, ones), words(ones, ones))] == [
        0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD,
    ]  # fmt: skip


def test_random_bits_differ_by_seed_and_stream():
    shape = torch.Size([1000])
    a, b, c = (random_bits(shape, torch.tensor(s), k) for s, k in ((1, 0), (2, 0), (1, 1)))
    assert torch.equal(a, random_bits(shape, torch.tensor(1), 0))
    assert not torch.equal(a, b) and not torch.equal(a, c)
    assert a.min() >= 0 and a.max() < 2**24


def test_random_bits_are_philoxs_words_by_seed_stream_and_number():
    """The upper 24 bits of the first word; no part of the seed or of the number is left out."""
    seed, stream, count = 2**61 + 2**33 + 3, 5, 2**16 + 2**8 + 1
    bits = random_bits(torch.Size([3, count]), torch.tensor(seed), stream).flatten()
    for number in (0, 1, 2**8, 2**16, 3 * count - 1):
        counter = [torch.tensor(word) for word in (number, 0, stream, 0)]
        word = philox(tuple(counter), (torch.tensor(seed % 2**32), torch.tensor(seed >> 32)))[0]
        assert bits[number] == word >> 8


def test_a_format_goes_by_its_name_elsewhere_too():
    assert Rule(low="e4m3fn") == Rule(low="e4m3")

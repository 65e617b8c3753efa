"""Rounding against ml_dtypes over every float32 there is: all 2^32 bit patterns, for each FP8 format and threshold.

    python tests/exhaustive.py numba reference
    TRITON_INTERPRET=1 python tests/exhaustive.py triton    # without a GPU: 2^19 patterns, chosen for their ties

Values and groups are compared bit by bit, the payload of NaN and the sign of zero too. The oracle casts with ml_dtypes,
not with torch, whose cast to E4M3 saturates on a CPU where ml_dtypes gives NaN.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import ml_dtypes
import numba
import numpy as np
import torch
from torch import Tensor

import lnpu_torch as lnpu
from lnpu_torch.ops import dispatch
from lnpu_torch.ops.quantize import torch_ops as ops
from lnpu_torch.quant.precision import Rule

Array = np.ndarray[Any, Any]

BACKENDS = {"reference": "reference", "numba": "auto", "triton": "triton"}
"""Each with the name that `dispatch.backend` has for it, on a CPU."""
CASTS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
WINDOWS = {"e4m3": (8, -7), "e5m2": (15, 7)}
"""Exponent of each format's top binade, and the lowest that its window's may have."""
THRESHOLDS = (-100, -61, -26, 0, 5, 27, 30, 63)
"""From nothing in FP8 to nearly everything: windows held at their lowest, at its edge and above; every quarter."""
CHUNK = 2**16
"""Patterns at a time: few enough to stay in the cache."""
LOWER = np.array((0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0xFFFF), np.uint32)
"""The lower halves that a subset has, with every upper one: ties, and what lies beside them."""


@dataclass(frozen=True)
class Case:
    """One way of rounding, by its definition: FGMP, or uniform FP8, which saturates."""

    low: str
    threshold: int
    uniform: bool = False

    @property
    def rule(self) -> Rule:
        return Rule(low=self.low, high=None) if self.uniform else Rule(low=self.low)

    def expected(self, x: Array, wide: Array) -> tuple[Array, Array]:
        """Values and groups; `wide` is x in binary16."""
        top, least = WINDOWS[self.low]
        exponent, quarter = divmod(self.threshold, 4)
        scale = 2.0 ** (max(exponent, least) - top)
        if self.uniform:
            largest = np.float32(float(ml_dtypes.finfo(CASTS[self.low]).max) * scale)
            q = np.where(np.isfinite(x), self._cast(np.clip(np.nan_to_num(x), -largest, largest), scale), x)
            return q, (q != 0) * np.uint8(8)
        small = np.abs(x) < np.float32(2.0**exponent * (1 + quarter / 4))
        if not small.any():
            return wide, (wide != 0) * np.uint8(16)
        if small.all():
            q = self._cast(x, scale)
            return q, (q != 0) * np.uint8(8)
        q = np.where(small, self._cast(np.where(small, x, np.float32(0)), scale), wide)
        return q, (q != 0) * np.where(small, np.uint8(8), np.uint8(16))

    def _cast(self, x: Array, scale: float) -> Array:
        codes = (x * np.float32(1 / scale)).astype(CASTS[self.low])
        return codes.astype(np.float32) * np.float32(scale)  # type: ignore[no-any-return]


CASES = [Case(low, t) for low in CASTS for t in THRESHOLDS] + [Case(low, 33, uniform=True) for low in CASTS]


def every_pattern() -> Iterator[Array]:
    """All float32s, in order of their bits."""
    for start in range(0, 2**32, CHUNK):
        yield np.arange(start, start + CHUNK, dtype=np.uint32).view(np.float32)


def some_patterns() -> Iterator[Array]:
    for start in range(0, 2**16, CHUNK // len(LOWER)):
        upper = np.arange(start, start + CHUNK // len(LOWER), dtype=np.uint32) << 16
        yield (upper[:, None] | LOWER).ravel().view(np.float32)


def in_binary16(x: Array) -> Array:
    """numpy's cast; what is not finite as it is, once it is seen to stay so."""
    with np.errstate(over="ignore", invalid="ignore"):
        wide = x.astype(np.float16).astype(np.float32)
    finite = np.isfinite(x)
    assert np.array_equal(np.isnan(wide), np.isnan(x)) and np.array_equal(wide[np.isinf(x)], x[np.isinf(x)])
    return np.where(finite, wide, x)  # type: ignore[no-any-return]


def differences(backend: str, case: Case, x: Tensor, expected: tuple[Array, Array]) -> Array:
    """Which elements of x a backend rounds otherwise, or puts into another group."""
    threshold = torch.tensor(case.threshold, dtype=torch.int32, device=x.device)
    with dispatch.backend(BACKENDS[backend]):  # type: ignore[arg-type]
        found = ops.quantize(x, threshold, None, case.rule.model_dump_json(), 0, True)
    values, groups, totals = (each.cpu().numpy() for each in found)
    counted = [np.count_nonzero(expected[1] == group) for group in (0, 8, 16)]
    assert totals.tolist() == counted, f"{backend}: {case}: elements by group {totals.tolist()}, not {counted}"
    wrong = (values.view(np.uint32) != expected[0].view(np.uint32)) | (groups != expected[1])
    return np.flatnonzero(wrong)


def compare(backends: list[str], patterns: Iterable[Array], device: str = "cpu") -> int:
    """Compare all cases on all patterns; returns how many patterns there were. Ends the program at a difference."""
    count = 0
    for x in patterns:
        wide, source, count = in_binary16(x), torch.from_numpy(x).to(device), count + len(x)
        for case in CASES:
            expected = case.expected(x, wide)
            for backend in backends:
                if len(wrong := differences(backend, case, source, expected)):
                    first = f"{x[wrong[0]]!r}, bits {x.view(np.uint32)[wrong[0]]:#010x}"
                    sys.exit(f"{backend}: {case}: {len(wrong)} of {len(x)} patterns differ, the first: {first}")
        if not count % 2**28:
            print(f"{count / 2**32:.1%}", file=sys.stderr, flush=True)
    return count


def main(backends: list[str]) -> None:
    """Compare these backends, and print what was compared."""
    torch.set_num_threads(1)
    versions = {name: version for name, version in lnpu.versions().items() if version}
    versions |= {each.__name__: each.__version__ for each in (ml_dtypes, numba, np)}
    print(", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    on_gpu, began = "triton" in backends and torch.cuda.is_available(), time.perf_counter()
    patterns = every_pattern() if on_gpu or "triton" not in backends else some_patterns()
    count = compare(backends, patterns, "cuda" if on_gpu else "cpu")
    took, today = f"{(time.perf_counter() - began) / 60:.1f} min", datetime.now(UTC).date()
    print(f"{today}, {', '.join(backends)}: {count} patterns x {len(CASES)} cases, no difference; {took}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["reference", "numba"])

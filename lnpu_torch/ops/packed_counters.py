"""Packed counters, marks and bits in compiled loops (see `vector_rounding`): summed, counted, unpacked into int32.

It knows that sums are over positions, channels or runs, and not how numbers are rounded.
"""

from __future__ import annotations

from numba import int32, uint32, uint64

from lnpu_torch.counts.lane_configs import RUN
from lnpu_torch.ops.numba_jit import compiled
from lnpu_torch.ops.vector_rounding import MOST, add_to, get, nothing, ones, plus, total
from lnpu_torch.ops.vectors import LANES


@compiled
def count_runs(bits, count, positions, runs, place):
    """Bits that are set in each run of some channels [channels, positions], into `runs` from a place on."""
    if positions % RUN == 0:
        for i in range(count // RUN):
            runs[uint64(place + i)] = ones(bits[uint64(i)])
    else:
        for start in range(0, count, positions):
            for t in range(0, positions, RUN):
                runs[uint64(place)] = ones(_window(bits, start + t, min(RUN, positions - t)))
                place += 1


@compiled
def _window(bits, start, count):
    """Up to 16 bits from `start` on."""
    i = uint64(start) // uint64(LANES)
    word = uint32(bits[i]) | (uint32(bits[i + uint64(1)]) << uint32(LANES))
    return (word >> uint32(start % LANES)) & ((uint32(1) << uint32(count)) - uint32(1))


@compiled
def sum_groups(marks, count, samples, position, length):
    """Sum `count` marks [positions, groups, length] over the length, into `samples` [2, groups, positions]."""
    start = 0
    while start < count:
        for group in range(samples.shape[1]):
            both = _sum(marks, start, length)
            samples[0, uint64(group), uint64(position)] = both & int32(0xFFFF)
            samples[1, uint64(group), uint64(position)] = both >> 16
            start += length
        position += 1


@compiled
def _sum(marks, start, count):
    """Sum of `count` marks from `start` on: FP8 in the lower 16 bits, wide in the upper ones."""
    both = int32(0)
    for part in range(0, count, LANES * MOST):
        left, counters = min(LANES * MOST, count - part), nothing()
        for i in range(0, left - LANES + 1, LANES):
            counters = plus(counters, get(marks, start + part + i, LANES))
        if left % LANES:
            counters = plus(counters, get(marks, start + part + left - left % LANES, left % LANES))
        both += total(counters)
    return both


@compiled
def fold_runs(sums, count, runs, t):
    """Packed counters [positions, channels] -> non-zeros of a run of each channel; the counters are zero afterwards.

    There are up to 16 positions, a power of two.
    """
    _halve(sums, count, len(runs), RUN)
    for c in range(len(runs)):
        runs[uint64(c), uint64(t)] = (sums[uint64(c)] & 0xFF) + (sums[uint64(c)] >> 8)
    sums[:] = 0


@compiled
def _halve(sums, count, least, times):
    """Add the upper half of packed counters to the lower, and again, down to `least`; returns how many are left.

    No sum becomes more than `times` what a counter held.
    """
    while times > 1 and count % (2 * least) == 0:
        count, times = count // 2, times // 2
        for i in range(0, count, LANES):
            add_to(get(sums, count + i, count - i), sums, i)
    return count


@compiled
def fold(sums, most, fp8, wide):
    """Add packed counters [channels, positions] to FP8 and wide ones [positions]; the packed ones are zero afterwards.

    `most` is the most that any of them holds: as long as they can hold more, they are added to each other.
    """
    positions = len(fp8)
    count = _halve(sums, len(sums) - LANES, positions, MOST // most)
    for start in range(0, count, positions):
        for i in range(positions):
            fp8[i] = int32(fp8[i] + (sums[start + i] & 0xFF))
            wide[i] = int32(wide[i] + (sums[start + i] >> 8))
    sums[:] = 0


@compiled
def unpack(packed, fp8, wide):
    """Add packed counts to FP8 and wide ones; the packed ones are zero afterwards."""
    for i in range(len(fp8)):
        fp8[i] = int32(fp8[i] + (packed[i] & 0xFF))
        wide[i] = int32(wide[i] + (packed[i] >> 8))
        packed[i] = 0

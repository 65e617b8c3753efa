"""The SIMD core of a chip, for what is no multiply-accumulate. It knows constants, and nothing of what was run."""

from __future__ import annotations

from lnpu_torch.files import Frozen
from lnpu_torch.hardware.sourced_value import Natural, NotNegative, Tagged


class SimdCore(Frozen):
    """A core for operations on elements, beside the multipliers: the slower of the two tells the time.

    `operation_pj` holds at the low end of the operating range, without operands: each operation reads them from SRAM,
    and writes its result there. A special function (division, a root, exp ...) takes as long and as much energy as
    `special_operations` operations.
    """

    operations_per_cycle: Tagged[Natural]
    special_operations: Tagged[Natural]
    operation_pj: Tagged[NotNegative]
    element_bits: Tagged[Natural]

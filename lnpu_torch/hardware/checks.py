"""Checks: published figures of a chip, each with the condition that it holds for, that our own can stand beside."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lnpu_torch.files import Frozen
from lnpu_torch.hardware.sourced_value import Positive, SourcedValue

Share = Annotated[float, Field(ge=0, le=0.999)]
Format = Literal["fp8", "fp16"]
Quantity = Literal["efficiency", "throughput", "power"]
UNITS: dict[Quantity, str] = {"efficiency": "TFLOPS/W", "throughput": "TFLOPS", "power": "W"}


class Over(Frozen):
    """What a ratio is to: a chip's name (None is the chip itself), the format, and the zeros of both operands."""

    chip: str | None = None
    format: Format
    zeros: tuple[Share, Share]


class Check(SourcedValue[Positive]):
    """A figure of the whole chip, in TFLOPS/W, TFLOPS or W; or, with `over`, how many times another one it is.

    It holds where all operands are of `format`, with so many zeros among the first operand's elements and the second's
    (None where no source tells), at `voltage_v` (None is the chip's own). `fitted` are the keys of the constants that
    were chosen so that it comes out: it is no independent check of these. `why` says why ours differs, or what of the
    condition is our reading.
    """

    of: Quantity
    format: Format
    zeros: tuple[Share, Share] | None
    voltage_v: Positive | None = None
    over: Over | None = None
    fitted: tuple[str, ...] = ()
    why: str = ""

    @property
    def unit(self) -> str:
        """The unit of the figure, "x" of a ratio."""
        return "x" if self.over else UNITS[self.of]

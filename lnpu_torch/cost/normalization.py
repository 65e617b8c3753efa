"""Brings chips' published efficiencies to one process, and to one voltage if asked, by the table of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lnpu_torch.files import ConfigError
from lnpu_torch.hardware.checks import Check
from lnpu_torch.hardware.chip import Chip
from lnpu_torch.hardware.node_scaling import interpolated, node_scale


class Normalized(NamedTuple):
    """A published efficiency in TFLOPS/W, where it holds, and what it is in another process; None if outside the table.

    `assumed` says what of the process and the voltage it holds at no source tells; `lacks` why there is no result.
    """

    chip: Chip
    name: str
    check: Check
    nm: float | None
    voltage_v: float
    assumed: tuple[str, ...]
    result: float | None
    lacks: str = ""


def normalized(chips: Sequence[Chip], nm: float, voltage_v: float | None = None) -> list[Normalized]:
    """Every published efficiency of some chips in one process.

    Args:
        chips: those with `checks` of their efficiency; others have no row.
        nm: the process that all are brought to.
        voltage_v: the voltage that all are brought to; None keeps each one's own.

    Raises:
        ConfigError: the process lies outside the table, or the voltage is none.
    """
    interpolated(nm)
    if voltage_v is not None and not 0.1 <= voltage_v <= 2:
        raise ConfigError(f"voltage: {voltage_v:g} V is no supply of such a chip; 0.1 ... 2 V")
    checks = [(chip, name, check) for chip in chips for name, check in chip.checks.items()]
    return [_row(*each, nm, voltage_v) for each in checks if each[2].unit == "TFLOPS/W" and each[2].zeros is not None]


def between(rows: Sequence[Normalized], nm: float) -> list[float]:
    """The processes, the asked one among them, that were interpolated."""
    found = {nm, *(row.nm for row in rows if row.nm and row.result is not None)}
    return sorted((each for each in found if interpolated(each)), reverse=True)


def _row(chip: Chip, name: str, check: Check, nm: float, voltage_v: float | None) -> Normalized:
    point, node = chip.operating_point, chip.node_nm
    own = point.voltage_v.value if check.voltage_v is None else check.voltage_v
    known = {end.voltage_v.value: end.voltage_v.tag for end in (point.low, point.high) if end}
    assumed = ["V"] if known.get(own, point.voltage_v.tag) == "assumed" else []
    if node is None:
        return Normalized(chip, name, check, None, own, tuple(assumed), None, "its file has no node_nm")
    assumed = (["nm"] if node.tag == "assumed" else []) + assumed
    row = Normalized(chip, name, check, node.value, own, tuple(assumed), None)
    try:
        scale = node_scale(node.value, own, nm, own if voltage_v is None else voltage_v)
    except ConfigError as error:
        return row._replace(lacks=str(error))
    return row._replace(result=check.value / scale)

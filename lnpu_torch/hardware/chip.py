"""Chip: rates, energies, memories and skip policy of one accelerator, each with its source."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from rich.console import RenderableType

from lnpu_torch.counts.lane_configs import LANES
from lnpu_torch.files import (
    MISSING,
    MOST,
    ConfigError,
    Frozen,
    builtin_names,
    find,
    is_file,
    listed,
    nearest,
    parse_yaml,
    read_text,
    validate,
)
from lnpu_torch.hardware.checks import Check
from lnpu_torch.hardware.energy_tables import BottomUp
from lnpu_torch.hardware.node_scaling import node_scale
from lnpu_torch.hardware.operating_point import OperatingPoint
from lnpu_torch.hardware.sourced_value import (
    Bits,
    Natural,
    NotNegative,
    Positive,
    SourcedRange,
    SourcedValue,
    sourced_values,
    value_text,
)
from lnpu_torch.named_files import NamedFile, file_to_read
from lnpu_torch.text_tables import Rows, add_row, plain_table


class MacsPerCycle(Frozen):
    """Multiply-accumulates that the whole chip starts in one cycle; None in a format that it does not compute in."""

    fp8: SourcedValue[Natural] | None
    fp16: SourcedValue[Natural] | None


class Formats(Frozen):
    """What the chip's multipliers take for FP8 and for FP16, such as INT8; None is FP8, FP16 itself."""

    fp8: SourcedValue[Annotated[str, Field(min_length=1)]] | None = None
    fp16: SourcedValue[Annotated[str, Field(min_length=1)]] | None = None


class Lanes(Frozen):
    """How the multipliers fall into lanes, each of which streams one channel, and which of these wait for each other.

    All lanes wait for the fullest after every `sync_interval` positions; `balance_group` neighbours share their work.
    """

    count: SourcedValue[Annotated[int, Field(gt=0, le=LANES)]]
    sync_interval: SourcedValue[Literal[16, 64, 256]]
    balance_group: SourcedValue[Literal[1, 4, 16]]

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.count.value % self.balance_group.value:
            raise ValueError(f"count {self.count.value} is not a multiple of balance_group {self.balance_group.value}")
        return self


class SramSize(Frozen):
    """How the energy of a bit grows with SRAM: the size that the file's energies are of, and a power of the size."""

    at_bytes: SourcedValue[Natural]
    exponent: SourcedRange

    @model_validator(mode="after")
    def _no_faster_than_the_square(self) -> Self:
        if max(self.exponent.value, *(self.exponent.range or (0.0,))) > 2:
            raise ValueError(f"exponent {self.exponent.value:g} or its range is above 2")
        return self


class Energy(Frozen):
    """Energies at the low end of the operating range, DRAM's at any voltage of the chip.

    A MAC: a multiplication in FP8, one that is skipped, and one in FP16, or FP16's over FP8's; None in a format that
    the chip does not compute in. A bit: read from SRAM, written to it, moved from or to DRAM. SRAM's are those of the
    size in `sram_size`. `reuse_in_mac`: how many multiplications a value that is read from SRAM serves in what a MAC
    costs. `idle_w` flows while multipliers wait; while they work, it is in what a MAC costs. `dram_static_w` flows in
    DRAM all the time.
    """

    fp8_mac_pj: SourcedValue[NotNegative] | None
    fp16_mac_pj: SourcedValue[NotNegative] | None = None
    skipped_mac_pj: SourcedValue[NotNegative]
    fp16_to_fp8: SourcedRange | None
    sram_read_pj_per_bit: SourcedValue[NotNegative]
    sram_write_pj_per_bit: SourcedValue[NotNegative]
    sram_size: SramSize
    reuse_in_mac: SourcedValue[Natural]
    idle_w: SourcedRange
    dram_static_w: SourcedRange
    dram_pj_per_bit: SourcedRange

    @model_validator(mode="after")
    def _fp16_stands_once(self) -> Self:
        if self.fp16_mac_pj and self.fp16_to_fp8:
            raise ValueError("fp16_mac_pj and fp16_to_fp8 say the same: one of them is null")
        if self.fp16_to_fp8 and not self.fp8_mac_pj:
            raise ValueError("fp16_to_fp8 needs fp8_mac_pj, whose multiple it is")
        return self


CALIBRATED = ("energy.fp8_mac", "energy.skipped_mac", "energy.fp16_", "energy.sram_read", "energy.sram_write")
"""How the keys begin that only the calibrated model uses."""

NOT_PRICED = ("node_nm", "year", "formats.")
"""How the keys begin that no price hangs on."""


class Storage(Frozen):
    """How an operand's elements lie in both memories: bits of a zero, of an FP8 and of an FP16 element.

    `partial_sum_bits` is what one element of a result takes while it is summed up.
    """

    zero_bits: SourcedValue[Bits]
    fp8_bits: SourcedValue[Bits]
    fp16_bits: SourcedValue[Bits]
    partial_sum_bits: SourcedValue[Natural]


class Skip(Frozen):
    """The operand whose zeros each step skips; a named operand is the streamed one."""

    forward: SourcedValue[Literal["input", "weight", "both", "none"]]
    grad_input: SourcedValue[Literal["grad_output", "weight", "both", "none"]]
    grad_weight: SourcedValue[Literal["input", "grad_output", "both", "none"]]


class SimdCore(Frozen):
    """A core for vector operations, beside the multipliers.

    `operation_pj` holds at the low end of the operating range, without operands: each operation reads them from SRAM,
    and writes its result there. A special function (division, a root, exp ...) takes as long and as much energy as
    `special_operations` operations.
    """

    operations_per_cycle: SourcedRange
    special_operations: SourcedValue[Natural]
    operation_pj: SourcedValue[NotNegative]
    element_bits: SourcedValue[Natural]


class Chip(Rows, Frozen):
    """One accelerator at one operating point. `str()` is a table of its values; notebooks and rich show it too.

    `energy_model` says what MACs and SRAM cost: "calibrated", by `energy`; "bottom_up", by the tables in `bottom_up`.
    `fp8_pairs` says which multiplications run at FP8's rate and energy: those whose streamed operand is FP8
    ("streamed"), those whose operands "both" are, "never", or "always". `mixed_tensors` says whether elements of both
    may stand in one tensor. `padding` says what a MAC outside the image is: a zero of the step's first operand
    ("as_zero"), or not scheduled ("free"). `node_nm` is the process, `year` that of the publication. `lanes` is None
    where nobody told how multipliers wait for each other: all are then taken for busy. `checks` are published figures,
    by a name for each. `inherited` are the values that the chip's file took from others, and from which.
    """

    name: str
    description: str
    node_nm: SourcedValue[Positive] | None = None
    year: SourcedValue[Natural] | None = None
    formats: Formats = Formats()
    energy_model: Literal["calibrated", "bottom_up"] = "calibrated"
    operating_point: OperatingPoint
    macs_per_cycle: MacsPerCycle
    sram_bytes: SourcedValue[Natural]
    dram_bytes_per_s: SourcedRange
    lanes: Lanes | None
    fp8_pairs: SourcedValue[Literal["streamed", "both", "never", "always"]]
    mixed_tensors: SourcedValue[bool]
    energy: Energy
    storage: Storage
    skip: Skip
    padding: SourcedValue[Literal["as_zero", "free"]]
    simd: SimdCore | None = None
    bottom_up: BottomUp | None = None
    checks: dict[str, Check] = {}
    inherited: dict[str, str] = {}

    @model_validator(mode="after")
    def _rates(self) -> Self:
        rates, energy, pairs = self.macs_per_cycle, self.energy, self.fp8_pairs.value
        fp16 = energy.fp16_mac_pj or energy.fp16_to_fp8
        for rate, known, name, other in (
            (rates.fp8, energy.fp8_mac_pj, "fp8", "never"),
            (rates.fp16, fp16, "fp16", "always"),
        ):
            if (rate is None) != (pairs == other):
                raise ValueError(f"macs_per_cycle.{name} is null if, and only if, fp8_pairs is '{other}'")
            if rate and not known:
                raise ValueError(f"macs_per_cycle.{name} has a rate, but energy has no {name}_mac_pj")
        return self

    @model_validator(mode="after")
    def _has_tables(self) -> Self:
        if self.energy_model == "bottom_up" and self.bottom_up is None:
            raise ValueError("energy_model is 'bottom_up', but there is no bottom_up")
        voltage = self.operating_point.voltage_v.value
        if self.bottom_up and not 0 <= (scale := self.bottom_up.arithmetic.scale(voltage)) <= MOST:
            raise ValueError(f"bottom_up: energies are {scale:g} times the measured ones at {voltage:g} V")
        return self

    @model_validator(mode="after")
    def _can_be_checked(self) -> Self:
        low, high = self.operating_point.low.voltage_v.value, self.operating_point.highest_v
        for name, check in self.checks.items():
            if unknown := [key for key in check.fitted if key not in self.values()]:
                raise ValueError(f"checks.{name}: fitted: no value has the key {unknown[0]!r}")
            own = [check.format, *([check.over.format] if check.over and check.over.chip is None else [])]
            if lacks := [each for each in own if getattr(self.macs_per_cycle, each) is None]:
                raise ValueError(f"checks.{name}: the chip does not compute in {lacks[0]}")
            if check.voltage_v is not None and not low <= check.voltage_v <= high:
                raise ValueError(f"checks.{name}: voltage_v {check.voltage_v:g} is outside {low:g} ... {high:g} V")
        return self

    @property
    def clock_hz(self) -> float:
        """The clock at the chip's voltage."""
        return self.operating_point.clock_hz

    def runs_fp8(self, streamed: str, other: str) -> bool:
        """Whether a product of these groups ("zero", "fp8", "fp16", "fp32") runs as FP8; a zero is an FP8 code."""
        asked = {"streamed": [streamed], "both": [streamed, other], "never": ["fp16"], "always": []}
        return all(group in ("zero", "fp8") for group in asked[self.fp8_pairs.value])

    @model_validator(mode="after")
    def _works_with_more_than_it_waits_with(self) -> Self:
        if not self.idle_w < self.operating_point.power_w:
            raise ValueError(
                f"energy.idle_w is no less than the chip's whole power, {self.operating_point.power_w:g} W"
            )
        return self

    @property
    def idle_w(self) -> float:
        """Power while multipliers wait, at the chip's voltage, with whose square it grows."""
        point = self.operating_point
        return self.energy.idle_w.value * (point.voltage_v.value / point.low.voltage_v.value) ** 2

    def cycles(self, fp8_macs: int, fp16_macs: int, channels: int | None = None, values: int = 1) -> float:
        """Cycles of these multiplications with no lane waiting for another.

        Args:
            channels: of the operand that is streamed, each of which is a lane's; None takes every multiplier for busy.
            values: of the other operand that an element meets, each of which is a multiplier's.
        """
        rates = (self.macs_per_cycle.fp8, self.macs_per_cycle.fp16)
        pairs = zip((fp8_macs, fp16_macs), rates, strict=True)
        return sum(macs / rate.value / self._busy(rate.value, channels, values) for macs, rate in pairs if rate)

    def _busy(self, rate: int, channels: int | None, values: int) -> float:
        """The share of lanes, and of their multipliers, that channels and values of such numbers fill."""
        if channels is None or self.lanes is None:
            return 1.0
        lanes = self.lanes.count.value
        width = rate / lanes
        return channels / (lanes * -(-channels // lanes)) * (values / (width * math.ceil(values / width)))

    def values(self) -> dict[str, SourcedValue[Any]]:
        """Every sourced value under its dotted key, as in the YAML."""
        return sourced_values(self)

    def tags(self) -> dict[str, int]:
        """How many of the values that its energy model uses are published, derived and assumed."""
        count = Counter(entry.tag for key, entry in self.values().items() if not key.startswith(self._unused))
        return {tag: count[tag] for tag in ("published", "derived", "assumed")}

    def origins(self) -> dict[str, int]:
        """How many of these values its file took from which other one."""
        return Counter(name for key, name in self.inherited.items() if not key.startswith(self._unused))

    @property
    def _unused(self) -> tuple[str, ...]:
        """How the keys begin that the chip's energy model does not use."""
        return (*NOT_PRICED, *(CALIBRATED if self.energy_model == "bottom_up" else ("bottom_up.",)))

    def with_values(self, values: Mapping[str, Any]) -> Chip:
        """The same chip with other values, by dotted key ("macs_per_cycle.fp16", "energy_model"); they are "assumed".

        Raises:
            ConfigError: the chip has no such key, or the value is not one that the key can have.
        """
        data = self.model_dump()
        for key, value in values.items():
            _set(data, self, key, value)
            data["inherited"].pop(key, None)
        return validate(Chip, data, self.name)

    def to_rows(self) -> list[dict[str, Any]]:
        """Every value under its key, with its tag, source and range, and the chip whose file it is from."""
        values = {key: entry.model_dump(mode="json") for key, entry in self.values().items()}
        return [{"key": key, **entry, "from": self.inherited.get(key, self.name)} for key, entry in values.items()]

    def _blocks(self) -> list[RenderableType]:
        """Every value with its tag and source, and the file that it is from if that is not the chip's own."""
        heads = ["key", "value", "tag", *(["from"] if self.inherited else []), "source"]
        table = plain_table(f"{self.name}: {self.description}", heads, [])
        for key, entry in self.values().items():
            origin = [self.inherited.get(key, "")] if self.inherited else []
            add_row(table, key, value_text(entry), entry.tag, *origin, entry.source)
        return [table]


def chip(name_or_path: str | Path | Chip, voltage: float | None = None) -> Chip:
    """A Chip from a built-in name ("lnpu", "dense-fp16", ...), a YAML file's path, or itself.

    A file may start from another with `like: NAME_OR_PATH` (a path as seen from the file) and give only what differs;
    a sourced value is replaced whole. If it gives `node_nm`, the energies in SCALED that it does not give are the other
    one's at its own process and voltage. The chip's name is the file's, unless it gives another;
    its description then tells what it is like.

    Args:
        voltage: run it at this voltage, in V, in place of its own.

    Raises:
        ConfigError: no such chip; a key is missing or unknown; a value, tag, source or unit is wrong. Names the key.
    """
    if voltage is not None:
        return chip(name_or_path).with_values({"operating_point.voltage_v": voltage})
    if isinstance(name_or_path, Chip):
        return name_or_path
    path = find("chips", name_or_path, "chip")
    data = _read(path, ())
    try:
        return validate(Chip, data, str(path))
    except ConfigError as error:
        if "inherited" in data or f"{path}: {MISSING}: " not in str(error):
            raise
        raise ConfigError(f"{error}. With `like: lnpu` in it, it need only give what differs") from None


def chips() -> list[Chip]:
    """The built-in chips, by name."""
    return [chip(name) for name in builtin_names("chips")]


def _set(data: dict[str, Any], chip: Chip, key: str, value: Any) -> None:
    """Put a value under a dotted key of a chip's plain data. Raises ConfigError if the chip has no such key."""
    known = [*chip.values(), "energy_model"]
    if key not in known:
        raise ConfigError(f"{chip.name}: no key {key!r}{nearest(key, known)}; known: {listed(known)}")
    *folders, last = key.split(".")
    for folder in folders:
        data = data[folder]
    if key == "energy_model":
        data[last] = value
    else:
        data[last] |= {"value": value, "tag": "assumed", "source": "set by hand"}
        data[last].pop("range", None)


def _read(path: Path, above: tuple[Path, ...]) -> Any:
    """A chip file's plain data, with what it is `like` filled in. Raises ConfigError."""
    data = deepcopy(_parsed(read_text(path, "chip"), str(path)))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a chip: a mapping of keys is expected")
    data, start = _current(data), {"name": path.stem}
    if "like" not in data:
        return _merge(start, data)
    base = _base(data.pop("like"), path, (*above, path.resolve()))
    known, own = base.pop("inherited", {}), set(_dotted(data))
    merged = _merge({**base, **start, "description": f"{base['name']}, with other values"}, data)
    inherited = {key: known.get(key, base["name"]) for key in _dotted(merged) if key not in own}
    if "node_nm" in data:
        _to_node(merged, base, [key for key in SCALED if key in inherited], path)
    return {**merged, "inherited": inherited}


@lru_cache(maxsize=32)
def _parsed(text: str, path: str) -> Any:
    """`parse_yaml`, once for a file that many are `like`: half the time of `lnpu chips` otherwise."""
    return parse_yaml(text, path)


SCALED = ("energy.sram_read_pj_per_bit", "energy.sram_write_pj_per_bit", "simd.operation_pj")
"""Energies that hang on the process, but of which those of a MAC, which a chip's file has from its own figures."""


def _to_node(data: dict[str, Any], base: dict[str, Any], keys: Iterable[str], path: Path) -> None:
    """Scale energies of a chip's plain data from the process and voltage of the chip that it is like to its own."""
    places = [_number(each, key) for each in (base, data) for key in ("node_nm", "operating_point.low.voltage_v")]
    for key in keys:
        if None in places or places[:2] == places[2:] or _number(data, key) is None:
            continue
        nm, voltage, own_nm, own_voltage = (float(place or 0) for place in places)
        try:
            scale = node_scale(nm, voltage, own_nm, own_voltage)
        except ConfigError as error:
            raise ConfigError(f"{path}: {key} cannot be taken from {base['name']}: {error}") from None
        entry = _at(data, key)
        told = f"times {scale:.4g}, from {nm:g} nm and {voltage:g} V (Stillmaker & Baas 2017)"
        tag = "assumed" if entry["tag"] == "assumed" else "derived"
        entry |= {"value": entry["value"] * scale, "tag": tag, "source": f"{entry['source']}; {told}"}


def _at(data: Any, key: str) -> Any:
    """What stands at a dotted key of plain data; None if there is nothing."""
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _number(data: Any, key: str) -> float | None:
    """The value of a sourced value in plain data, if it is a positive number."""
    found = _at(data, f"{key}.value")
    return found if isinstance(found, int | float) and found > 0 else None


def _dotted(data: Any, prefix: str = "") -> Iterator[str]:
    """The dotted keys of all sourced values, and of what is null, in a chip file's plain data."""
    for key, value in data.items() if isinstance(data, dict) else ():
        if value is None or (isinstance(value, dict) and "value" in value):
            yield prefix + key
        elif key != "inherited":
            yield from _dotted(value, f"{prefix}{key}.")


RENAMED = {
    ("energy", "skipped_slot_pj"): "skipped_mac_pj",
    ("lanes", "run"): "sync_interval",
    ("lanes", "balancer"): "balance_group",
}
"""Keys of older files, and what they are called today."""

GONE = {("storage", "results")}
"""Keys of older files that say nothing any more: what goes through DRAM follows from sizes."""


def _current(data: dict[str, Any]) -> dict[str, Any]:
    """A chip's plain data, from older files and run folders too, under today's names."""
    return {
        place: {RENAMED.get((place, key), key): value for key, value in inside.items() if (place, key) not in GONE}
        if isinstance(inside, dict)
        else inside
        for place, inside in data.items()
    }


OWN = ("description", "year", "checks")
"""Keys that a file never takes from the one it is like."""

ADDED = (("energy", "sram_size"), ("energy", "reuse_in_mac"), ("energy", "idle_w"), ("energy", "dram_static_w"))
"""Keys that a run's chip of an older version lacks; it gets LNPU's."""


def _completed(data: dict[str, Any]) -> dict[str, Any]:
    """A run's chip, as an older version wrote it, with the keys that it lacks."""
    lnpu, data = _read(find("chips", "lnpu", "chip"), ()), _current(data)
    for place, key in ADDED:
        if isinstance(data.get(place), dict):
            data[place].setdefault(key, lnpu[place][key])
    return {**{key: lnpu[key] for key in ("dram_bytes_per_s", "mixed_tensors")}, **data}


def _base(like: Any, path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """What a chip takes from the one it is `like`: everything but what is said of that one alone."""
    if not isinstance(like, str):
        raise ConfigError(f"{path}: like: a chip's name or path is expected, got {like!r}")
    beside = path.parent / like
    base = find("chips", beside if is_file(beside) else like, f"chip in {path}: like:")
    if base.resolve() in above:
        raise ConfigError(f"{path}: like: {like!r} comes back to itself")
    return {key: value for key, value in _read(base, above).items() if key not in OWN}


def _merge(base: Any, over: Any) -> Any:
    """`over` laid on `base`, mapping by mapping; a sourced value is one piece."""
    if not (isinstance(base, dict) and isinstance(over, dict)) or "value" in base or "value" in over:
        return over
    return {**base, **{key: _merge(base.get(key), value) for key, value in over.items()}}


class ChipFile(NamedFile):
    """A chip's file, and what it said, with what it is `like` filled in."""

    content: Chip

    @field_validator("content", mode="before")
    @classmethod
    def _of_plain_data(cls, value: Any) -> Any:
        return validate(Chip, _completed(value), "content") if isinstance(value, dict) else value


def chip_setting(value: Any) -> Any:
    """A chip in a run's settings, plain data, under today's names; a chip's name as it is."""
    if isinstance(value, dict) and isinstance(value.get("content"), dict):
        return {**value, "content": _completed(value["content"])}
    return value


def hold_chip(value: str | ChipFile, again: bool = False) -> str | ChipFile:
    """A chip's name as it is; its file's name with what the file says.

    Args:
        value: a name, a path, or what this function gave for a path.
        again: read the file anew, if it is there.

    Raises:
        ConfigError: the file is no chip.
    """
    name = file_to_read(value, again)
    return value if name is None else ChipFile(file=os.path.abspath(name), content=chip(name))

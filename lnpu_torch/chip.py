"""Chip: rates, energies and skip policy of one accelerator, every value tagged. It knows nothing of what was run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Self, TypeVar

from pydantic import Field, model_validator
from rich.table import Table

from lnpu_torch.config import ConfigError, Frozen, builtin_names, find, parse_yaml, read_text, validate
from lnpu_torch.tables import add_row, plain_table

Tag = Literal["published", "derived", "assumed"]
Value = TypeVar("Value")
Energy = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Rate = Annotated[int, Field(gt=0)]


class Tagged(Frozen, Generic[Value]):
    """A value, and what it rests on: stated in `source`, derived from it by a formula, or assumed by us."""

    value: Value
    tag: Tag
    source: Annotated[str, Field(min_length=1)]


class Ratio(Tagged[Positive]):
    """A ratio that is known only to lie in `range`; reports show the band."""

    range: tuple[Positive, Positive] | None = None

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if self.range and not self.range[0] <= self.value <= self.range[1]:
            raise ValueError(f"value {self.value} is outside its range {list(self.range)}")
        return self


class OperatingPoint(Frozen):
    """Where the energies hold, and how long a cycle is."""

    voltage_v: Tagged[Positive]
    clock_hz: Tagged[Positive]


class MacsPerCycle(Frozen):
    """Multiply-accumulates that the whole chip starts in one cycle; `fp8` is None on a chip without FP8."""

    fp8: Tagged[Rate] | None
    fp16: Tagged[Rate]


class EnergyLine(Frozen):
    """Energy of one slot: a multiplication in FP8, one that is skipped, and FP16's over FP8's."""

    fp8_mac_pj: Tagged[Energy]
    skipped_slot_pj: Tagged[Energy]
    fp16_to_fp8: Ratio


class Skip(Frozen):
    """The operand whose zeros each step skips; a named operand is the streamed one."""

    forward: Tagged[Literal["input", "weight", "both", "none"]]
    grad_input: Tagged[Literal["grad_output", "weight", "both", "none"]]
    grad_weight: Tagged[Literal["input", "grad_output", "both", "none"]]


class Chip(Frozen):
    """One accelerator at one operating point.

    `fp8_pairs` says which multiplications run at FP8's rate and energy: those whose streamed operand is FP8
    ("streamed"), those whose operands "both" are, or "never". `padding` says what a slot outside the image is: a zero
    of the step's first operand ("as_zero"), or not scheduled ("free").
    """

    name: str
    description: str
    operating_point: OperatingPoint
    macs_per_cycle: MacsPerCycle
    fp8_pairs: Tagged[Literal["streamed", "both", "never"]]
    energy: EnergyLine
    skip: Skip
    padding: Tagged[Literal["as_zero", "free"]]

    @model_validator(mode="after")
    def _fp8_rate(self) -> Self:
        if (self.macs_per_cycle.fp8 is None) != (self.fp8_pairs.value == "never"):
            raise ValueError("macs_per_cycle.fp8 is null if, and only if, fp8_pairs is 'never'")
        return self

    def runs_fp8(self, streamed: str, other: str) -> bool:
        """Whether a product of these groups ("zero", "fp8", "fp16", "fp32") runs as FP8; a zero is an FP8 code."""
        asked = {"streamed": [streamed], "both": [streamed, other], "never": ["fp16"]}[self.fp8_pairs.value]
        return all(group in ("zero", "fp8") for group in asked)

    def cycles(self, fp8_macs: int, fp16_macs: int) -> float:
        """Cycles of these multiplications with every lane busy."""
        fp8, fp16 = self.macs_per_cycle.fp8, self.macs_per_cycle.fp16
        return (fp8_macs / fp8.value if fp8 else 0.0) + fp16_macs / fp16.value

    def values(self) -> dict[str, Tagged[Any]]:
        """Every tagged value under its dotted key, as in the YAML."""
        return dict(_tagged(self, ""))

    def tags(self) -> dict[str, int]:
        """How many values are published, derived and assumed."""
        count = Counter(entry.tag for entry in self.values().values())
        return {tag: count[tag] for tag in ("published", "derived", "assumed")}


def chip(name_or_path: str | Path | Chip) -> Chip:
    """A Chip from a built-in name ("lnpu", "dense-fp16", ...), a YAML file's path, or itself.

    A file may start from another with `like: NAME_OR_PATH` (a path as seen from the file) and give only what differs;
    a tagged value is replaced whole. The chip's name is the file's, unless it gives another.

    Raises:
        ConfigError: no such chip; a key is missing or unknown; a value, tag, source or unit is wrong. Names the key.
    """
    if isinstance(name_or_path, Chip):
        return name_or_path
    path = find("chips", name_or_path, "chip")
    return validate(Chip, _read(path, ()), str(path))


def chips() -> list[Chip]:
    """The built-in chips, by name."""
    return [chip(name) for name in builtin_names("chips")]


def chips_table(chips: Sequence[Chip]) -> Table:
    """One line per chip: its rates, energies and what it skips."""
    rates = ["MHz", "MAC/cycle FP8", "FP16", "pJ/MAC FP8", "FP16", "skipped"]
    table = plain_table("Chips", ["chip", "what it is", "skips FF", "EP", "WG"], rates)
    for each in chips:
        fp8, line, skip = each.macs_per_cycle.fp8, each.energy, each.skip
        add_row(
            table,
            *(each.name, each.description),
            *(skip.forward.value, skip.grad_input.value, skip.grad_weight.value),
            f"{each.operating_point.clock_hz.value / 1e6:g}",
            *(f"{fp8.value}" if fp8 else "-", f"{each.macs_per_cycle.fp16.value}"),
            *(f"{line.fp8_mac_pj.value:g}" if fp8 else "-", f"{line.fp8_mac_pj.value * line.fp16_to_fp8.value:g}"),
            f"{line.skipped_slot_pj.value:g}",
        )
    return table


def chip_table(chip: Chip) -> Table:
    """Every value of one chip, with its tag and source."""
    table = plain_table(f"{chip.name}: {chip.description}", ["key", "value", "tag", "source"], [])
    for key, entry in chip.values().items():
        band = entry.range if isinstance(entry, Ratio) else None
        value = f"{entry.value:.10g}" if isinstance(entry.value, float) else f"{entry.value}"
        add_row(table, key, f"{value} ({band[0]:g} ... {band[1]:g})" if band else value, entry.tag, entry.source)
    return table


def _read(path: Path, above: tuple[Path, ...]) -> Any:
    """A chip file's plain data, with what it is `like` filled in. Raises ConfigError."""
    data = parse_yaml(read_text(path, "chip"), str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: not a chip: a mapping of keys is expected")
    start = {"name": path.stem}
    if "like" in data:
        start = {**_base(data.pop("like"), path, (*above, path.resolve())), **start}
    return _merge(start, data)


def _base(like: Any, path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """What a chip takes from the one it is `like`: everything but its description."""
    if not isinstance(like, str):
        raise ConfigError(f"{path}: like: a chip's name or path is expected, got {like!r}")
    beside = path.parent / like
    base = find("chips", beside if beside.is_file() else like, f"chip in {path}: like:")
    if base.resolve() in above:
        raise ConfigError(f"{path}: like: {like!r} comes back to itself")
    return {key: value for key, value in _read(base, above).items() if key != "description"}


def _merge(base: Any, over: Any) -> Any:
    """`over` laid on `base`, mapping by mapping; a tagged value is one piece."""
    if not (isinstance(base, dict) and isinstance(over, dict)) or "value" in base or "value" in over:
        return over
    return {**base, **{key: _merge(base.get(key), value) for key, value in over.items()}}


def _tagged(model: Frozen, prefix: str) -> Iterator[tuple[str, Tagged[Any]]]:
    for key, value in model:
        if isinstance(value, Tagged):
            yield prefix + key, value
        elif isinstance(value, Frozen):
            yield from _tagged(value, f"{prefix}{key}.")

"""Counts: what a run did, exactly, and independent of any chip."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, model_validator
from rich.console import RenderableType
from rich.text import Text

from lnpu_torch.counts.densities import Densities
from lnpu_torch.counts.lane_profile import LaneProfile
from lnpu_torch.counts.vector_ops import NotCounted, VectorOpCounts
from lnpu_torch.counts.vector_ops import merge as merge_vector_ops
from lnpu_torch.files import MOST, ConfigError, Frozen, parse_json, read_text, validate, write_text
from lnpu_torch.text_tables import Rows, add_row, plain_table, si

VERSION: Literal[6] = 6
"""Version of the file format.

Older files are read: 1 has no lane profiles, 2 no `in_float`, 3 has other names, 4 does not know the order in which
things ran, nor multiplications by size, 5 takes all elements of a call as used, in one group.
"""

Step = Literal["forward", "grad_input", "grad_weight"]
STEPS: tuple[Step, ...] = ("forward", "grad_input", "grad_weight")
OPERANDS: dict[Step, tuple[str, str]] = {
    "forward": ("input", "weight"),
    "grad_input": ("grad_output", "weight"),
    "grad_weight": ("input", "grad_output"),
}
"""The two operands that each step multiplies, the customarily streamed one first."""

Count = Annotated[int, Field(ge=0, le=MOST)]
Triple = tuple[Count, Count, Count]  # zero, fp8, wide
Table = tuple[Triple, Triple, Triple]


class Operand(Frozen):
    """How the elements of one operand fell into groups, summed over all calls.

    `wide` says what the elements above FP8 are: "fp16", or "fp32" for an operand left in float. `lanes` is how long
    lanes work and wait if steps stream the operand, None where that was not recorded.
    """

    wide: Literal["fp16", "fp32"]
    elements: Triple
    lanes: LaneProfile | None = None

    @model_validator(mode="after")
    def _lanes_close(self) -> Self:
        if self.lanes and self.lanes.work != sum(self.elements[1:]):
            raise ValueError(f"lanes have {self.lanes.work} non-zeros, and elements {sum(self.elements[1:])}")
        return self

    def __add__(self, other: Operand) -> Operand:
        lanes = self.lanes and other.lanes and self.lanes + other.lanes
        return self.model_copy(update={"elements": add_groups(self.elements, other.elements), "lanes": lanes})


class Calls(Frozen):
    """A step's calls of one size, such as those with full batches, or the one with the last, smaller batch.

    `sizes` are the elements of both operands and of the result in one call; `first` and `second` say how the
    operands' elements fell into groups, summed over these calls; `macs` and `pairs` are their part of the step's.
    `passed` is what passes through the chip, in words of 16 bits, since the first and the second operand were there
    last, and until the result is used, besides these tensors themselves; None where nobody looked.
    `used` are the elements of both operands and of the result that take part in any multiplication inside the grids;
    None where all do. Each of `groups`, a convolution's or a batched product's, multiplies tensors of its own.
    """

    count: Annotated[int, Field(ge=1, le=MOST)]
    sizes: Triple
    first: Triple
    second: Triple
    macs: Count | None = None
    pairs: Table | None = None
    passed: Triple | None = None
    used: Triple | None = None
    groups: Annotated[int, Field(ge=1, le=MOST)] = 1

    @model_validator(mode="after")
    def _used_are_there(self) -> Self:
        if self.used and any(used > size for used, size in zip(self.used, self.sizes, strict=True)):
            raise ValueError(f"{self.used} elements are used of {self.sizes}")
        return self

    @property
    def size(self) -> tuple[Any, ...]:
        """What calls that are summed have in common; it also sorts them."""
        return self.sizes, self.passed or (), self.pairs is None, self.used or (), self.groups


class Origin:
    """Of which model counts are, while they are in memory: its process, and its number there. It makes none unequal."""

    def __init__(self, model: tuple[str, int, int] | None = None) -> None:
        self.model = model

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return 0

    def differs(self, other: Origin) -> bool:
        """Whether two are known to be different models. Those of different processes may be ranks of one."""
        if self.model is None or other.model is None:
            return False
        return self.model[:2] == other.model[:2] and self.model != other.model


class StepCounts(Frozen):
    """One step of one layer, summed over all its calls.

    `macs` is what a dense chip would multiply: the sum of `pairs`, plus `padding`, which lies outside the image, plus
    `not_run`, whose step nobody asked for.
    `pairs[i][j]` is the number of multiplications, inside the image, of a first operand of group i with a
    second operand of group j; groups are (zero, fp8, wide). Every skip policy is a sum over this table.
    `by_size` has the calls that were run by their size, which is what fits into a chip's SRAM or does not; it is empty
    where that was not recorded.
    """

    layer: str
    kind: str
    step: Step
    calls: Count
    macs: Count
    padding: Count
    not_run: Count
    pairs: Table
    first: Operand
    second: Operand
    by_size: tuple[Calls, ...] = ()
    _origin: Origin = PrivateAttr(default_factory=Origin)

    @model_validator(mode="after")
    def _sizes_close(self) -> Self:
        for which in ("first", "second") if self.by_size else ():
            parts = [getattr(each, which) for each in self.by_size]
            if reduce(add_groups, parts) != getattr(self, which).elements:
                raise ValueError(f"{self.layer} {self.step}: {which} elements are not the sum of those by size")
        known = [each.pairs for each in self.by_size if each.pairs]
        if known and len(known) == len(self.by_size) and reduce(add_tables, known) != self.pairs:
            raise ValueError(f"{self.layer} {self.step}: pairs are not the sum of those by size")
        return self

    @model_validator(mode="after")
    def _closes(self) -> Self:
        inside = sum(map(sum, self.pairs))
        if self.macs != inside + self.padding + self.not_run:
            raise ValueError(f"{self.layer} {self.step}: macs {self.macs} are not pairs + padding + not_run")
        return self

    def fits(self, other: StepCounts) -> bool:
        """Whether both can be of one layer in one state: of equal kind, formats and channels, and of one model."""
        channels = [{a.lanes.channels, b.lanes.channels} for a, b in _operands(self, other) if a.lanes and b.lanes]
        formats = all(a.wide == b.wide for a, b in _operands(self, other))
        alike = self.kind == other.kind and formats and all(len(each) == 1 for each in channels)
        return alike and not self._origin.differs(other._origin)

    def __add__(self, other: StepCounts) -> StepCounts:
        """The sum of two that fit."""
        return self.model_copy(
            update={
                **{key: getattr(self, key) + getattr(other, key) for key in ("calls", "macs", "padding", "not_run")},
                "pairs": add_tables(self.pairs, other.pairs),
                "first": self.first + other.first,
                "second": self.second + other.second,
                "by_size": _merge_sizes(self, other),
            }
        )


class FloatProduct(Frozen):
    """Calls of one torch op that multiplied and accumulated outside of emulated layers."""

    calls: Annotated[int, Field(ge=1)]
    macs: Count

    def __add__(self, other: FloatProduct) -> FloatProduct:
        return FloatProduct(calls=self.calls + other.calls, macs=self.macs + other.macs)


class Counts(Rows, Frozen):
    """What a run did: one entry per layer and step, in the model's order. Saved as versioned JSON; `str()` is a table.

    Sum two of the same model with `+` (epochs, ranks), repeat one with `*`; price one with `lnpu_torch.price`.
    `vector_ops` is what ran besides multiply-accumulates, or why that was not counted.
    `in_float` are multiply-accumulates outside of emulated layers, by torch op; None where nobody looked.
    `extrapolated` says that some of the work was not counted, but taken to be like what was.
    `estimate` says, if it is none of a run's own counts, what they were made from; None for those.
    """

    version: Literal[6] = VERSION
    extrapolated: bool = False
    estimate: Annotated[str, Field(min_length=1)] | None = None
    steps: tuple[StepCounts, ...]
    vector_ops: VectorOpCounts | NotCounted = NotCounted(reason="these counts are of layers' own steps only")
    in_float: dict[str, FloatProduct] | None = None

    @model_validator(mode="after")
    def _unique(self) -> Self:
        if len({(entry.layer, entry.step) for entry in self.steps}) != len(self.steps):
            raise ValueError("a layer's step stands twice")
        return self

    def _blocks(self) -> list[RenderableType]:
        heads = [f"{share}, {operand}" for operand in ("first", "second") for share in ("zeros", "FP8")]
        table = plain_table("Counts", ["layer", "kind", "step"], ["calls", "MACs", *heads])
        for each in self.steps:
            operands = [each.first.elements, each.second.elements]
            shares = [f"{part / (sum(some) or 1):.1%}" for some in operands for part in some[:2]]
            add_row(table, each.layer or "(model)", each.kind, each.step, f"{each.calls:,}", si(each.macs), *shares)
        others = self.vector_ops
        told = f"vector operations: {others.reason if isinstance(others, NotCounted) else 'counted'}"
        return [table, *map(Text, [f"estimate: {self.estimate}"] if self.estimate else []), Text(told)]

    def to_rows(self) -> list[dict[str, Any]]:
        """Each layer's step: its calls, its multiplications, and its operands' elements by group."""
        return [
            {
                **{
                    key: getattr(entry, key) for key in ("layer", "kind", "step", "calls", "macs", "padding", "not_run")
                },
                **{
                    f"{name}_{group}": count
                    for name, operand in (("first", entry.first), ("second", entry.second))
                    for group, count in zip(("zero", "fp8", "wide"), operand.elements, strict=True)
                },
            }
            for entry in self.steps
        ]

    def __add__(self, other: Counts) -> Counts:
        return Counts.merge([self, other])

    def __mul__(self, times: int) -> Counts:
        """The same work so many times over, by doubling."""
        parts, doubled = [], self
        while times:
            parts += [doubled] if times & 1 else []
            doubled, times = doubled + doubled, times >> 1
        return Counts.merge(parts)

    @classmethod
    def merge(cls, parts: Iterable[Counts]) -> Counts:
        """The sum of counts, as from several epochs or ranks.

        Layers of one name that cannot be the same are kept apart, the second as "fc (2)": those of another kind or
        number of channels (a new head), with other operands in float (another precision), or of another model of this
        process (a GAN's two networks).
        """
        parts, merged = list(parts), dict[str, dict[Step, StepCounts]]()
        for part in parts:
            for name, entries in part._layers().items():
                _add_layer(merged, name, entries)
        seen = [part.in_float for part in parts]
        return cls(
            steps=tuple(entry for entries in merged.values() for entry in entries.values()),
            vector_ops=merge_vector_ops([part.vector_ops for part in parts]),
            in_float=None if None in seen else _sum_products([each for each in seen if each]),
            extrapolated=any(part.extrapolated for part in parts),
            estimate="; ".join(dict.fromkeys(part.estimate for part in parts if part.estimate)) or None,
        )

    def densities(self) -> Densities:
        """The densities of each layer's operands in each step, as `with_sparsity` and `estimate` take them."""
        from lnpu_torch.counts import what_if  # imported late: it is made of Counts

        return what_if.densities(self)

    def with_sparsity(self, densities: Densities | Mapping[str, Any]) -> Counts:
        """What the same run would do with other zeros, and other FP8 shares, in its operands: an estimate.

        Elements that change are chosen at random, whatever they are multiplied by. Lanes wait as much for each non-zero
        as they did.

        Args:
            densities: `Densities`, or plain data of the same form, such as
                `{"default": {"weight": 0.5}, "layers": {"layer1.*": {"input": {"nonzero": 0.3, "fp8": 0.9}}}}`. What
                nothing is said of stays as it was counted.

        Raises:
            ConfigError: a share outside 0 ... 1, an unknown key, or a layer that was not counted.
        """
        from lnpu_torch.counts import what_if

        return what_if.with_sparsity(self, densities)

    def with_batch(self, batch: int, was: int) -> Counts:
        """What a run over the same samples would do in batches of another size: an estimate.

        Multiplications, and vector operations but for updates, stay; how often weights are read, and how often they
        are updated, changes, and so does what passes between two uses of a tensor.

        Args:
            batch: samples in a batch.
            was: samples in the largest batches of the run, which its counts do not say.

        Raises:
            ConfigError: a batch below 1, a size that the counts contradict, or counts without the sizes of calls.
        """
        from lnpu_torch.counts import what_if

        return what_if.with_batch(self, batch, was)

    def of_model(self, model: tuple[str, int, int]) -> Counts:
        """The same counts, known to be of this model as long as they are in memory: its process, and a number."""
        for entry in self.steps:
            entry._origin = Origin(model)
        return self

    def _layers(self) -> dict[str, dict[Step, StepCounts]]:
        layers: dict[str, dict[Step, StepCounts]] = {}
        for entry in self.steps:
            layers.setdefault(entry.layer, {})[entry.step] = entry
        return layers

    def save(self, path: str | Path) -> None:
        """Write versioned JSON, whole or not at all. Raises ConfigError."""
        write_text(path, self.json_text())

    def json_text(self) -> str:
        """What `save` writes."""
        text = self.model_dump_json(indent=1, exclude_none=True)
        return re.sub(r"\[[\d\s,]*\]", lambda numbers: "".join(numbers[0].split()), text) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Counts:
        """Read what `save` wrote.

        Raises:
            ConfigError: the file is missing, truncated, of another version, or does not add up.
        """
        data = parse_json(read_text(Path(path), "counts file"), str(path))
        if not isinstance(data, dict) or "version" not in data or "steps" not in data:
            raise ConfigError(f"{path}: not a counts file (no 'version' and 'steps')")
        if type(data["version"]) is not int or not 1 <= data["version"] <= VERSION:
            raise ConfigError(f"{path}: counts of version {data['version']!r}; this lnpu_torch reads up to {VERSION}")
        return validate(cls, _current(data), str(path))


def _current(data: dict[str, Any]) -> dict[str, Any]:
    """A file's data under the names of this version."""
    if data["version"] < 4:
        data = {"vector_ops" if key == "elements" else key: value for key, value in data.items()}
        data["steps"] = _renamed(data["steps"], {"slots": "macs", "lane_cycles": "cycles_by_config"})
    return {**data, "version": VERSION}


def _renamed(data: Any, names: dict[str, str]) -> Any:
    """Plain data in which keys have other names, however deep."""
    if isinstance(data, dict):
        return {names.get(key, key): _renamed(value, names) for key, value in data.items()}
    return [_renamed(each, names) for each in data] if isinstance(data, list) else data


def _merge_sizes(a: StepCounts, b: StepCounts) -> tuple[Calls, ...]:
    """The calls of both by size; none, if those of either were not recorded."""
    if any(sum(entry.first.elements) and not entry.by_size for entry in (a, b)):
        return ()
    merged: dict[tuple[Any, ...], Calls] = {}
    for each in (*a.by_size, *b.by_size):
        merged[each.size] = _add_calls(merged[each.size], each) if each.size in merged else each
    return tuple(merged[key] for key in sorted(merged))


def _add_calls(a: Calls, b: Calls) -> Calls:
    pairs = a.pairs and b.pairs and add_tables(a.pairs, b.pairs)
    macs = None if a.macs is None or b.macs is None else a.macs + b.macs
    groups = {"first": add_groups(a.first, b.first), "second": add_groups(a.second, b.second), "pairs": pairs}
    return a.model_copy(update={"count": a.count + b.count, "macs": macs, **groups})


def add_tables(a: Table, b: Table) -> Table:
    return (add_groups(a[0], b[0]), add_groups(a[1], b[1]), add_groups(a[2], b[2]))


def add_groups(a: Triple, b: Triple) -> Triple:
    return (a[0] + b[0], a[1] + b[1], a[2] + b[2])


def _operands(a: StepCounts, b: StepCounts) -> tuple[tuple[Operand, Operand], tuple[Operand, Operand]]:
    return (a.first, b.first), (a.second, b.second)


def _add_layer(merged: dict[str, dict[Step, StepCounts]], name: str, entries: dict[Step, StepCounts]) -> None:
    """Add a layer's steps to those of the first layer of its name that they fit; under a name of its own if to none."""
    for number in itertools.count(1):
        known = merged.setdefault(name if number == 1 else f"{name} ({number})", {})
        if all(known[step].fits(entry) for step, entry in entries.items() if step in known):
            break
    for step, entry in entries.items():
        layer = name if number == 1 else f"{name} ({number})"
        named = entry if entry.layer == layer else entry.model_copy(update={"layer": layer})
        known[step] = known[step] + named if step in known else named


def _sum_products(parts: Iterable[dict[str, FloatProduct]]) -> dict[str, FloatProduct]:
    sums: dict[str, FloatProduct] = {}
    for op, product in (item for part in parts for item in part.items()):
        sums[op] = sums[op] + product if op in sums else product
    return dict(sorted(sums.items()))

"""RunComparison: several runs on several chips: energy and time of an epoch, of an image, and to an accuracy."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from rich.console import RenderableType
from rich.text import Text

from lnpu_torch.cost.pricing import EXTRAPOLATED, price
from lnpu_torch.cost.report import Report, caveats
from lnpu_torch.counts.schema import Counts
from lnpu_torch.counts.vector_ops import NotCounted
from lnpu_torch.files import MOST, ConfigError, is_file, write_text
from lnpu_torch.hardware.chip import Chip
from lnpu_torch.hardware.chip import chip as read_chip
from lnpu_torch.reporting.run_reader import Epoch, Run, merged, read_run
from lnpu_torch.text_tables import Rows, add_row, plain_table, si

ACCURACY, IMAGES = "test_accuracy", "images"
"""The metrics of an epoch that are read."""
J_PER_WH = 3600.0
TINY = 1e-12
"""Stands for what is above 0."""


class Questions(NamedTuple):
    """What is asked beside energy and time of an epoch; None is not asked.

    `accuracy` is a share, `images` those of an epoch where a run does not say, `co2_g_per_kwh` the grams that a kWh
    stands for, `battery_wh` a battery's capacity.
    """

    accuracy: float | None = None
    images: int | None = None
    co2_g_per_kwh: float | None = None
    battery_wh: float | None = None

    def check(self) -> None:
        """Raises ConfigError for what cannot be asked."""
        for name, value, low, high, told in (
            ("accuracy", self.accuracy, TINY, 1, "a share above 0, at most 1"),
            ("images", self.images, 1, MOST, "1 or more"),
            ("co2", self.co2_g_per_kwh, 0, MOST, "grams per kWh, 0 or more"),
            ("battery", self.battery_wh, TINY, MOST, "Wh, above 0"),
        ):
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name}: expected {told}; got {value:g}")


class Energies(NamedTuple):
    """Energy in J, and both ends of its range."""

    value: float
    low: float
    high: float

    def per(self, count: float) -> Energies:
        """Of one of so many."""
        return Energies(*(each / count for each in self))


class Point(NamedTuple):
    """The end of an epoch: its test accuracy, and the energy of chip and DRAM until then in J; None is not known."""

    epoch: int
    accuracy: float | None
    energy_j: float | None


@dataclass(frozen=True)
class ComparedRun:
    """A run on one chip, or on none if nothing was counted, as in float32: what all its epochs took.

    None is what is not known, or was not asked.

    Energies of the chip, of DRAM and of both are in J, times in s; `to_accuracy` has the epoch after which the accuracy
    was reached, the energy of both and the time until then.
    """

    run: str
    chip: str
    epochs: int
    accuracy: float | None
    chip_energy: Energies | None
    dram_energy: Energies | None
    time_s: float | None
    images: float | None
    to_accuracy: tuple[int, float, float] | None
    estimate: bool
    curve: tuple[Point, ...]

    @classmethod
    def of(cls, run: Run, chip: Chip, asked: Questions) -> Self:
        """Price a run."""
        if not counted(run):
            points = tuple(Point(epoch.number, epoch.metrics.get(ACCURACY), None) for epoch in run.epochs)
            return cls(run.name, "-", run.length, points[-1].accuracy, None, None, None, None, None, False, points)
        report = _priced(run.epochs, chip)
        images = [epoch.metrics.get(IMAGES, asked.images) for epoch in run.epochs for _ in range(epoch.stands_for)]
        return cls(
            run=run.name,
            chip=chip.name,
            epochs=run.length,
            accuracy=run.epochs[-1].metrics.get(ACCURACY),
            chip_energy=_chip_energy(report),
            dram_energy=_dram_energy(report),
            time_s=report.time_s,
            images=None if None in images else sum(each or 0 for each in images),
            to_accuracy=_to_accuracy(run.epochs, chip, asked.accuracy),
            estimate=report.estimate is not None,
            curve=tuple(_curve(run.epochs, chip)),
        )

    @property
    def all_energy(self) -> Energies | None:
        """Of chip and DRAM, where both are modelled."""
        if self.chip_energy is None or self.dram_energy is None:
            return None
        return Energies(*(a + b for a, b in zip(self.chip_energy, self.dram_energy, strict=True)))


def counted(run: Run) -> bool:
    """Whether anything was counted, which it is not in float32."""
    return any(epoch.counts.steps or not isinstance(epoch.counts.vector_ops, NotCounted) for epoch in run.epochs)


def _priced(epochs: Sequence[Epoch], chip: Chip) -> Report:
    return price(merged(epochs), chip)


def _chip_energy(report: Report) -> Energies | None:
    energy = report.total.energy_pj
    if energy is None:
        return None
    low, high = report.energy_range_pj if report.energy_range else (energy, energy)
    return Energies(energy * 1e-12, low * 1e-12, high * 1e-12)


def _dram_energy(report: Report) -> Energies | None:
    energy = report.total.dram_energy_pj
    if energy is None:
        return None
    low, high = report.dram_range_pj or (energy, energy)
    return Energies(energy * 1e-12, low * 1e-12, high * 1e-12)


def _curve(epochs: Sequence[Epoch], chip: Chip) -> Iterator[Point]:
    spent = 0.0
    for epoch in epochs:
        spent += (price(epoch.counts, chip).total.all_energy_pj or 0.0) * 1e-12 * epoch.stands_for
        yield Point(epoch.number, epoch.metrics.get(ACCURACY), spent)


def _to_accuracy(epochs: Sequence[Epoch], chip: Chip, wanted: float | None) -> tuple[int, float, float] | None:
    """None where it is not asked, not reached, or epochs before were not counted."""
    if wanted is None:
        return None
    for place, epoch in enumerate(epochs, start=1):
        if epoch.metrics.get(ACCURACY, 0.0) >= wanted:
            report, number = _priced(epochs[:place], chip), sum(each.stands_for for each in epochs[:place])
            energy = report.total.all_energy_pj
            return None if epoch.number != number or energy is None else (number, energy * 1e-12, report.time_s)
    return None


class Field(NamedTuple):
    """One number of a row: its name in CSV and rows, its head in tables, its unit, and what it says."""

    name: str
    head: str
    unit: str
    says: str

    def text(self, row: dict[str, Any]) -> str:
        """As tables show it, an energy with its range."""
        value = row[self.name]
        if value is None or isinstance(value, str):
            return value or "-"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if self.unit == "%":
            return f"{value:.2%}"
        ends = [row.get(self.name.replace("_j", end)) for end in ("_low_j", "_high_j")]
        if self.unit == "kWh":
            return si(1000 * value, "Wh")
        shown = si(value, self.unit) if self.unit else f"{value:.4g}"
        if None in ends or ends[0] == ends[1]:
            return shown
        return f"{shown} ({' ... '.join(si(each, self.unit) for each in ends)})"


FIELDS = (
    Field("run", "run", "", "the run's folder, or the file of its counts"),
    Field("chip", "chip", "", "the chip that it is priced on"),
    Field("epochs", "epochs", "", "epochs that were counted"),
    Field("accuracy", "accuracy", "%", "test accuracy after the last of them"),
    Field("chip_j", "chip, an epoch", "J", "energy on the chip, of an epoch"),
    Field("dram_j", "DRAM, an epoch", "J", "energy of DRAM, of an epoch"),
    Field("all_j", "chip + DRAM, an epoch", "J", "energy of both, of an epoch"),
    Field("time_s", "time, an epoch", "s", "time of an epoch"),
    Field("image_j", "an image", "J", "energy of chip and DRAM over images trained on"),
    Field("image_s", "time, an image", "s", "time over images trained on"),
    Field("accuracy_epoch", "reached after epoch", "", "the first epoch after which the accuracy asked for is reached"),
    Field("accuracy_j", "until then", "J", "energy of chip and DRAM until then"),
    Field("accuracy_s", "time until then", "s", "time until then"),
    Field("run_j", "whole run", "J", "energy of chip and DRAM, of all epochs"),
    Field("run_s", "time, whole run", "s", "time of all epochs"),
    Field("run_kwh", "in Wh", "kWh", "energy of chip and DRAM, of all epochs"),
    Field("co2_g", "CO2", "g", "what that energy stands for, at the grams per kWh that were given"),
    Field("battery_s", "battery lasts", "s", "how long the battery lasts at the mean power of chip and DRAM"),
    Field("battery_epochs", "epochs a charge", "", "epochs that a battery of the capacity given lasts for"),
    Field("estimate", "estimate", "", "whether counts that no run has made are in it"),
)
"""What there is of each row; energies of an epoch have `_low_j` and `_high_j` beside them."""
OF_EPOCH = ("epochs", "accuracy", "chip_j", "dram_j", "all_j", "time_s")
"""The fields of the first of both tables."""


@dataclass(frozen=True)
class RunComparison(Rows):
    """Runs on chips, in the order of the runs. `str()` is a table; a rich console prints it too.

    `notes` say what is to be known of single runs.
    """

    rows: tuple[ComparedRun, ...]
    asked: Questions
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, runs: Sequence[Run], chips: Sequence[Chip], asked: Questions) -> Self:
        """Price each run on each chip. Raises ConfigError for what cannot be asked."""
        asked.check()
        notes: dict[str, None] = {}
        for run in runs:
            if not counted(run):
                notes[f"{run.name}: nothing was counted, so that it has no price"] = None
                continue
            report = _priced(run.epochs, chips[0])
            extrapolated = [EXTRAPOLATED] if any(epoch.counts.extrapolated for epoch in run.epochs) else []
            extrapolated += [run.left_out] if run.left_out else []
            notes |= dict.fromkeys(f"{run.name}: {note}" for note in [*caveats(report), *extrapolated])
        rows = [ComparedRun.of(run, chip, asked) for run in runs for chip in (chips if counted(run) else chips[:1])]
        return cls(tuple(rows), asked, tuple(notes))

    def to_rows(self) -> list[dict[str, Any]]:
        """A flat mapping of plain values for each run and chip; J and s."""
        return [self._row(row) for row in self.rows]

    def _row(self, row: ComparedRun) -> dict[str, Any]:
        whole, epochs, time = row.all_energy, row.epochs, row.time_s
        energies = {"chip": row.chip_energy, "dram": row.dram_energy, "all": whole}
        epoch_j: dict[str, float | None] = {}
        for name, energy in energies.items():
            each = energy.per(epochs) if energy else (None, None, None)
            epoch_j |= dict(zip((f"{name}_j", f"{name}_low_j", f"{name}_high_j"), each, strict=True))
        reached = row.to_accuracy or (None, None, None)
        run_j = whole.value if whole else None
        kwh = run_j / (1000 * J_PER_WH) if run_j is not None else None
        co2, battery = self.asked.co2_g_per_kwh, self.asked.battery_wh
        charge = battery * J_PER_WH / run_j if battery is not None and run_j else None
        return {
            "run": row.run,
            "chip": row.chip,
            "epochs": epochs,
            "accuracy": row.accuracy,
            **epoch_j,
            "time_s": time / epochs if time is not None else None,
            "image_j": run_j / row.images if run_j is not None and row.images else None,
            "image_s": time / row.images if time is not None and row.images else None,
            **dict(zip(("accuracy_epoch", "accuracy_j", "accuracy_s"), reached, strict=True)),
            "run_j": run_j,
            "run_s": time,
            "run_kwh": kwh,
            "co2_g": kwh * co2 if kwh is not None and co2 is not None else None,
            "battery_s": charge * time if charge is not None and time is not None else None,
            "battery_epochs": charge * epochs if charge is not None else None,
            "estimate": row.estimate,
        }

    def csv_text(self) -> str:
        """One line for each run and chip; None is an empty cell."""
        text, rows = io.StringIO(), self.to_rows()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def to_csv(self, path: str | Path) -> None:
        """Write `csv_text()`. Raises ConfigError if that cannot be written."""
        write_text(path, self.csv_text())

    def shown(self) -> list[Field]:
        """The fields that say something in any row."""
        rows = self.to_rows()
        return [field for field in FIELDS if any(row[field.name] not in (None, False) for row in rows)]

    def _blocks(self) -> list[RenderableType]:
        (run, chip, *others), rows = self.shown(), self.to_rows()
        tables: list[RenderableType] = []
        for title, of_epoch in (("Of an epoch", True), ("Of an image, and of the run", False)):
            fields = [field for field in others if (field.name in OF_EPOCH) == of_epoch]
            table = plain_table(title, [run.head, chip.head], [field.head for field in fields])
            for row in rows:
                add_row(table, *(field.text(row) for field in (run, chip, *fields)))
            tables.append(table)
        return [*tables, *map(Text, self.notes)]


def compare(
    runs: Sequence[str | Path],
    chips: Sequence[str | Path | Chip] = ("lnpu",),
    *,
    accuracy: float | None = None,
    images: int | None = None,
    co2_g_per_kwh: float | None = None,
    battery_wh: float | None = None,
) -> RunComparison:
    """Set runs side by side: energy with its range, and time, of an epoch, of an image, of the run, to an accuracy.

    Args:
        runs: folders of runs, or files of counts, each of which is one epoch.
        chips: names, files or Chips.
        accuracy: until this share of the test images is right, where runs have a metric `test_accuracy`.
        images: of an epoch, where a run does not say.
        co2_g_per_kwh: grams of CO2 that a kWh of chip and DRAM stands for.
        battery_wh: a battery's capacity.

    Returns:
        A table; `to_pandas()` has its numbers.

    Raises:
        ConfigError: no such run or chip, or a number that makes no sense.
    """
    asked = Questions(accuracy, images, co2_g_per_kwh, battery_wh)
    return RunComparison.of(read_runs([Path(run) for run in runs]), [read_chip(chip) for chip in chips], asked)


def read_runs(paths: Sequence[Path], soon: bool = False) -> list[Run]:
    """Runs, of which a file of counts is one of a single epoch; those of one name are told apart by their paths.

    Args:
        soon: leave out epochs of large runs, as `read_run` does.

    Raises:
        ConfigError: one is neither, or is given twice.
    """
    again = [path for path, times in Counter(os.path.realpath(path) for path in paths).items() if times > 1]
    if again:
        raise ConfigError(f"{again[0]}: is given twice")
    runs = [_file(path) if is_file(path) else read_run(path, uncounted=True, soon=soon) for path in paths]
    often = Counter(run.name for run in runs)
    return [
        Run(str(path), run.settings, run.versions, run.epochs) if often[run.name] > 1 else run
        for path, run in zip(paths, runs, strict=True)
    ]


def _file(path: Path) -> Run:
    return Run(path.stem, {}, {}, (Epoch(1, Counts.load(path), {}),))

"""A training run as its folder has it: settings, metrics and counts of each epoch.

config.yaml           settings; of them only `chip` has a meaning here: names, or files with what they said
metrics.csv           a row per epoch, first column `epoch`
counts/epochN.json    what epoch N did; other names there are not read
versions.json         what it ran with, if that was recorded
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lnpu_torch.counts.schema import Counts
from lnpu_torch.files import MOST, ConfigError, inside, parse_json, parse_yaml, read_text, validate
from lnpu_torch.hardware.chip import Chip, ChipFile

EPOCH = re.compile(r"epoch(0|[1-9][0-9]{0,8})\.json")
"""The name of a file of counts."""

SOON_READ = 24_000_000
"""Bytes of counts that are read and priced on two chips in about ten seconds."""
FEWEST = 10
"""Epochs that are read of a run, however large they are."""


@dataclass(frozen=True)
class Epoch:
    """One epoch: its number, what it did, and those of its metrics that are finite numbers ("loss" ...).

    It stands for itself, and for those right before it that were not read.
    """

    number: int
    counts: Counts
    metrics: dict[str, float]
    stands_for: int = 1


@dataclass(frozen=True)
class Run:
    """A run with at least one counted epoch, in their order."""

    name: str
    settings: dict[str, Any]
    versions: dict[str, str]
    epochs: tuple[Epoch, ...]

    @property
    def chips(self) -> list[str | Chip]:
        """The chips that it was priced on as it went. Raises ConfigError if the settings hold what is no chip."""
        chips = self.settings.get("chip")
        return [_chip(chip) for chip in (chips if isinstance(chips, list) else [chips])] if chips else ["lnpu"]

    @property
    def length(self) -> int:
        """Epochs, whether they were read or others stand for them."""
        return sum(epoch.stands_for for epoch in self.epochs)

    @property
    def left_out(self) -> str | None:
        """How many epochs were not read, in words; None if all were."""
        if self.length == len(self.epochs):
            return None
        return f"{len(self.epochs)} of {self.length} epochs were read; each stands for those since the one before it"


def merged(epochs: Iterable[Epoch]) -> Counts:
    """The counts of epochs together, each as often as it stands for; extrapolated, if one stands for others."""
    alike: dict[int, list[Counts]] = {}
    for epoch in epochs:
        alike.setdefault(epoch.stands_for, []).append(epoch.counts)
    sums = {times: Counts.merge(counts) for times, counts in alike.items()}
    whole = Counts.merge(counts if times == 1 else counts * times for times, counts in sums.items())
    return whole if alike.keys() == {1} else whole.model_copy(update={"extrapolated": True})


def read_run(folder: str | Path, uncounted: bool = False, soon: bool = False) -> Run:
    """Read the folder of a run.

    Args:
        uncounted: take a run of which nothing was counted, as one in float32, too. Its epochs have empty counts.
        soon: of a run with more than SOON_READ bytes of counts, read so much, of epochs evenly spread, the last one
            among them; at least FEWEST epochs.

    Raises:
        ConfigError: there is no such folder, a file is missing or damaged or a link out of it, or nothing was counted.
    """
    folder = Path(folder)
    settings = parse_yaml(read_text(inside(folder, "config.yaml"), "run"), str(folder / "config.yaml"))
    if not isinstance(settings, dict):
        raise ConfigError(f"{folder / 'config.yaml'}: not the settings of a run: a mapping of keys is expected")
    names = [(EPOCH.fullmatch(file.name), file.name) for file in (folder / "counts").glob("epoch*.json")]
    files = {int(found[1]): inside(folder, f"counts/{name}") for found, name in names if found}
    if not files and not uncounted:
        raise ConfigError(f"{folder}: no epoch of this run was counted (counts/epochN.json)")
    metrics = _metrics(inside(folder, "metrics.csv"))
    if not files and not metrics:
        raise ConfigError(f"{folder}: this run has no epoch yet")
    epochs = tuple(
        Epoch(number, Counts.load(files[number]) if files else Counts(steps=()), metrics.get(number, {}), times)
        for number, times in _read(files or dict.fromkeys(metrics), soon).items()
    )
    return Run(folder.resolve().name, settings, _versions(inside(folder, "versions.json")), epochs)


def _read(files: Mapping[int, Path | None], soon: bool) -> dict[int, int]:
    """The epochs to read, and how many each stands for."""
    numbers, ends = sorted(files), [0]
    size = sum(file.stat().st_size for file in files.values() if soon and file and file.is_file())
    read = max(len(numbers) * SOON_READ // size, FEWEST) if size else len(numbers)
    read = min(read, len(numbers))
    ends += [(place + 1) * len(numbers) // read for place in range(read)]
    return {numbers[end - 1]: end - before for before, end in pairwise(ends)}


def _chip(value: Any) -> str | Chip:
    return validate(ChipFile, value, "config.yaml: chip").content if isinstance(value, dict) else str(value)


def _metrics(file: Path) -> dict[int, dict[str, float]]:
    """The numbers of metrics.csv, by epoch; an epoch that is not in it, such as one cut short, has none.

    What is not finite, as the loss of a run that diverged, is left out, and so is what no figure could show.
    """
    rows = csv.DictReader(io.StringIO(read_text(file, "metrics")))
    try:
        return {
            int(row["epoch"]): {name: float(cell) for name, cell in row.items() if _is_number(cell)} for row in rows
        }
    except (KeyError, TypeError, ValueError, csv.Error):
        raise ConfigError(f"{file}: not the metrics of a run: a first column `epoch` is expected") from None


def _is_number(cell: Any) -> bool:
    try:
        return abs(float(cell)) <= MOST
    except (TypeError, ValueError):
        return False


def _versions(file: Path) -> dict[str, str]:
    found = parse_json(read_text(file, "versions"), str(file)) if file.exists() else {}
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: not a mapping of versions")
    return {str(name): str(version) for name, version in found.items()}

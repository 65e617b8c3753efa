"""CostLog counts and prices a training run epoch by epoch, called from someone else's loop.

It writes what `lnpu report FOLDER` and `lnpu price` read:

    config.yaml         precision, overrides and chips, with what the files say that they name
    metrics.csv         a row per epoch
    counts/epochN.json  what epoch N did, on all ranks
    report.txt          the whole run, priced on each chip
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from torch import distributed, nn

import lnpu_torch as lnpu
from lnpu_torch.files import ConfigError, create_text, inside, parse_yaml, read_text, write_text
from lnpu_torch.hardware.chip import ChipFile, hold_chip
from lnpu_torch.named_files import content_of, differences
from lnpu_torch.quant.precision import hold_precision

Overrides = Mapping[str, str | Path | lnpu.Rule | lnpu.Precision | None]


class CostLog:
    """Converts a model, counts its epochs, prices and writes them. Ranks share thresholds, and their counts are summed.

    Call `convert` and `start`, then for each epoch `begin_epoch` and `end_epoch`, then `finish`; `close` at any
    time, if training was cut short. What runs between `pause` and `go_on`, such as validation, is not counted.
    """

    def __init__(
        self,
        precision: str | Path | lnpu.Rule | lnpu.Precision = "fgmp",
        *,
        overrides: Overrides | None = None,
        chips: Sequence[str | Path | lnpu.Chip] = ("lnpu", "dense-fp16"),
        folder: str | Path = "lnpu_run",
    ) -> None:
        """Precision and overrides are as in `lnpu_torch.convert`; shares in the metrics are those on the first chip.

        Raises:
            ConfigError: a chip does not exist, or none is named.
        """
        if not chips:
            raise ConfigError("chips: name at least one, such as lnpu")
        named = [
            ChipFile(file=each.name, content=each) if isinstance(each, lnpu.Chip) else hold_chip(str(each))
            for each in chips
        ]
        self.chips = [lnpu.chip(content_of(each)) for each in named]
        self.folder = Path(folder)
        self.metrics: list[dict[str, float]] = []
        self._precision = _hold(precision)
        self._overrides = {name: _hold(value) for name, value in (overrides or {}).items()}
        self._settings = {
            "precision": _plain(self._precision),
            "overrides": {name: _plain(value) for name, value in self._overrides.items()},
            "chip": [_plain(each) for each in named],
        }
        self._counter, self._pauses = ExitStack(), ExitStack()
        self._counted: list[lnpu.Counts] = []
        self._converts: bool | None = None  # known at the first call of `convert`

    def convert(self, model: nn.Module, *, complete: bool = True) -> None:
        """Convert the model in place, unless its owner has; called again, only what has come since.

        Args:
            complete: whether it has all its layers. Before, nothing that is missing is an error.

        Raises:
            ConfigError: the precision is wrong, or an override matches no layer.
        """
        if self._converts is None:
            self._converts = not lnpu.coverage(model).emulated
        self._model = model
        if not self._converts:
            return
        overrides = {name: content_of(value) for name, value in self._overrides.items()}
        with ExitStack() as tolerant:
            if not complete:
                tolerant.enter_context(suppress(ConfigError))
                tolerant.enter_context(warnings.catch_warnings(action="ignore"))
            lnpu.convert(model, content_of(self._precision), overrides=overrides, only_new=True)

    def start(self, *, resumed: bool = False) -> None:
        """Open the folder.

        Raises:
            ConfigError: it holds a run, and this one is not `resumed` from it, or has another precision.
        """
        self.close()
        self._shared = lnpu.ThresholdSync(self._model) if _ranks() > 1 else None
        self.metrics, self._counted = (self._earlier() if resumed else []), []
        if _rank() == 0 and resumed and (self.folder / "config.yaml").exists():
            self._check_settings()
        elif _rank() == 0:
            self._new_folder()

    def begin_epoch(self) -> None:
        """Count from here on."""
        self.close()
        self._cost = self._counter.enter_context(lnpu.CostCounter(self._model))

    def pause(self) -> None:
        """Compute as ever, but count nothing until `go_on`."""
        self.go_on()
        self._pauses.enter_context(lnpu.no_count(self._model))

    def go_on(self) -> None:
        """Count again; without a pause before it, nothing changes."""
        self._pauses.close()

    def step_done(self) -> None:
        """To be called after each optimizer step: ranks choose their thresholds together."""
        if self._shared:
            self._shared.all_reduce()

    def end_epoch(self, epoch: int) -> dict[str, float]:
        """Price and write what was counted since `begin_epoch`; all ranks call it. Epochs are numbered from 1.

        Returns:
            Energy in pJ by chip, and the shares of zeros and, of the others, FP8 among the elements that are streamed.
        """
        self.close()
        counts = lnpu.Counts.merge(_gathered(self._cost.counts))
        reports = [lnpu.price(counts, chip) for chip in self.chips]
        values = {f"{report.chip}_energy_pj": report.total.energy_pj for report in reports}
        values |= {"zero_share": reports[0].total.zero_share, "fp8_share": reports[0].total.fp8_share}
        known = {name: value for name, value in values.items() if value is not None}
        self._counted.append(counts)
        self.metrics = [row for row in self.metrics if row["epoch"] < epoch] + [{"epoch": epoch, **known}]
        if _rank() == 0:
            write_text(self.folder / "counts" / f"epoch{epoch}.json", counts.json_text(), own=True)
            write_text(self.folder / "metrics.csv", _csv(self.metrics), own=True)
        return known

    def finish(self) -> list[lnpu.Report]:
        """The epochs of this run (after a resumption, those since), priced on each chip; also written to report.txt."""
        self.close()
        reports = [lnpu.price(lnpu.Counts.merge(self._counted), chip) for chip in self.chips]
        if _rank() == 0:
            text = "\n\n".join(str(report.by("layer")) for report in reports) + "\n"
            write_text(self.folder / "report.txt", text, own=True)
        return reports

    def close(self) -> None:
        """Stop counting; what was counted remains."""
        self._pauses.close()
        self._counter.close()

    def _new_folder(self) -> None:
        """Raises ConfigError if it holds a run, or cannot be made."""
        config = inside(self.folder, "config.yaml")
        inside(self.folder, "counts")
        try:
            (self.folder / "counts").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot be made: {error.strerror}") from None
        try:
            create_text(config, yaml.safe_dump(self._settings, sort_keys=False))
        except FileExistsError:
            message = f"{self.folder}: holds a run already; choose another folder, or resume that run"
            raise ConfigError(message) from None

    def _check_settings(self) -> None:
        """Raises ConfigError if the run in the folder was begun with another precision."""
        config = inside(self.folder, "config.yaml")
        before = parse_yaml(read_text(config), str(config))
        if not isinstance(before, dict):
            raise ConfigError(f"{config}: not the settings of a run: a mapping of keys is expected")
        before = {name: before[name] for name in ("precision", "overrides") if name in before}
        changes = differences(before, {name: self._settings[name] for name in before})
        if changes:
            told = "\n  ".join(f"{key}: {change}" for key, change in changes.items())
            raise ConfigError(f"{self.folder}: this run was begun with other settings; choose another folder\n  {told}")

    def _earlier(self) -> list[dict[str, float]]:
        """Rows of the epochs before a run was cut short."""
        file = self.folder / "metrics.csv"
        rows = csv.DictReader(io.StringIO(read_text(file) if file.exists() else ""))
        try:
            return [
                {name: float(cell) for name, cell in row.items() if cell} | {"epoch": int(row["epoch"])} for row in rows
            ]
        except (KeyError, TypeError, ValueError, csv.Error):
            raise ConfigError(f"{file}: not the metrics of a run") from None


def _hold(value: Any) -> Any:
    """A precision as it is given; of a file, what it says."""
    return hold_precision(str(value)) if isinstance(value, str | Path) else value


def _plain(value: Any) -> Any:
    """A name as it is, what was held for a file, or a model's values."""
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def _csv(rows: Sequence[Mapping[str, float]]) -> str:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "epoch": int(row["epoch"])} for row in rows)
    return text.getvalue()


def _ranks() -> int:
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def _rank() -> int:
    return distributed.get_rank() if _ranks() > 1 else 0


def _gathered(counts: lnpu.Counts) -> list[lnpu.Counts]:
    """The counts of all ranks."""
    if _ranks() == 1:
        return [counts]
    parts: list[lnpu.Counts] = [counts] * _ranks()
    distributed.all_gather_object(parts, counts)
    return parts

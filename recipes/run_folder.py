"""A run's folder: resolved config, metrics, counts and checkpoint. It knows files, not how training goes.

    config.yaml         the resolved settings; `lnpu train RUN/config.yaml resume=RUN` goes on
    versions.json       what it began with
    metrics.csv         a row per epoch
    counts/epochN.json  what epoch N did; `lnpu price` reads it
    checkpoint.pt       everything the next epoch starts from

Every file is written beside its place and then renamed, so that a crash leaves the earlier one whole.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import lnpu_torch as lnpu
from lnpu_torch.config import ConfigError, listed, parse_yaml, read_text, write_text

NOT_COMPARED = ("resume", "out", "threads", "device")
"""Settings that may change when a run is resumed: they change neither weights nor counts (threads and device: not
beyond the order in which floating-point sums are taken)."""


class RunFolder:
    """The files of one run, under `path`.

    Raises:
        ConfigError: (every method) a file cannot be read or written; the message names it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoint = self.path / "checkpoint.pt"

    def start(self, config: Mapping[str, Any]) -> None:
        """Make the folder of a new run; one that holds a run already is refused."""
        if (self.path / "config.yaml").exists():
            raise ConfigError(f"{self.path}: holds a run already; choose another out=..., or resume={self.path}")
        try:
            (self.path / "counts").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be made: {error.strerror}") from None
        write_text(self.path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False))
        write_text(self.path / "versions.json", json.dumps(lnpu.versions(), indent=1) + "\n")

    def resume(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The state that `save` wrote last; settings that differ from the run's own are refused."""
        file = self.path / "config.yaml"
        before = parse_yaml(read_text(file, "run to resume"), str(file))
        changed = [
            f"{key}: {before.get(key)} -> {config.get(key)}"
            for key in dict.fromkeys([*before, *config])
            if before.get(key) != config.get(key) and key not in NOT_COMPARED
        ]
        if changed:
            raise ConfigError(f"{self.path}: cannot be resumed with other settings: {listed(changed)}")
        return self._load()

    def save(self, state: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]], counts: lnpu.Counts | None) -> None:
        """Write what the epoch of the last row of `metrics` did, then the state that the next starts from."""
        if counts is not None:
            counts.save(self.path / "counts" / f"epoch{metrics[-1]['epoch']}.json")
        text = io.StringIO()
        writer = csv.DictWriter(text, list(metrics[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(metrics)
        write_text(self.path / "metrics.csv", text.getvalue())
        self._write(dict(state))

    def counts(self) -> list[tuple[str, lnpu.Counts]]:
        """The counts of every epoch, in order, each with its name ("epoch1", ...)."""
        files = (self.path / "counts").glob("epoch*.json")
        in_order = sorted(files, key=lambda file: int(file.stem.removeprefix("epoch")))
        return [(file.stem, lnpu.Counts.load(file)) for file in in_order]

    def how_to_go_on(self) -> str:
        """One sentence for whom the run was cut short."""
        if not self.checkpoint.exists():
            return "No epoch was finished, so there is nothing to resume."
        command = f"lnpu train {self.path / 'config.yaml'} resume={self.path}"
        return f"The last good checkpoint is {self.checkpoint}. Go on with: {command}"

    def _write(self, state: dict[str, Any]) -> None:
        beside = self.path / f".checkpoint.pt.{os.getpid()}.partial"
        try:
            with beside.open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.checkpoint)
        except (OSError, RuntimeError) as error:  # torch's RuntimeError hides the OSError of a full disk behind it
            beside.unlink(missing_ok=True)
            reason = error.__context__ if isinstance(error.__context__, OSError) else error
            raise ConfigError(f"{self.checkpoint}: cannot be written: {reason}. {self.how_to_go_on()}") from None

    def _load(self) -> dict[str, Any]:
        try:
            state: dict[str, Any] = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise ConfigError(f"{self.path}: cannot be resumed: it has no checkpoint.pt") from None
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ConfigError(f"{self.checkpoint}: damaged, or not a checkpoint: {reason}") from None
        return state

"""A run's folder: resolved settings, metrics, counts and checkpoints. It knows files, not how training goes.

    config.yaml           the settings, and what the files say that they name; `lnpu train --resume RUN` goes on with it
    versions.json         what it runs with
    metrics.csv           a row per epoch
    counts/epochN.json    what epoch N did; `lnpu price` reads it
    checkpoints/*.pt      everything that the next step starts from
    tensorboard/          the rows of metrics.csv for TensorBoard, if asked for

Every file but TensorBoard's is written beside its place and then renamed, so that a crash leaves the earlier one whole.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

import lnpu_torch as lnpu
from lnpu_torch.files import ConfigError, create_text, inside, parse_json, parse_yaml, read_text, write_text
from lnpu_torch.named_files import differences
from lnpu_torch.recipes.checkpoints import Checkpoints
from lnpu_torch.recipes.settings import FREE, under_current_names


class RunFolder:
    """The files of one run, under `path`.

    Raises:
        ConfigError: (every method) a file cannot be read or written; the message names it.
    """

    def __init__(self, path: str | Path, keep: int = 2) -> None:
        self.path = Path(path)
        self.config, self.versions = self.path / "config.yaml", self.path / "versions.json"
        self.checkpoints = Checkpoints(self.path / "checkpoints", keep)

    def start(self, settings: Mapping[str, Any]) -> None:
        """Make the folder of a new run; one that holds a run already is refused."""
        self._check_links()
        try:
            (self.path / "counts").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be made: {error.strerror}") from None
        try:
            create_text(self.config, _yaml(settings))  # of several runs at once one makes it, and has the folder
        except FileExistsError:
            message = f"{self.path}: holds a run already; choose another out=..., or --resume {quote(str(self.path))}"
            raise ConfigError(message) from None
        write_text(self.versions, _json(lnpu.versions()), own=True)

    def resume(
        self, settings: Mapping[str, Any], accept_changes: bool, warn: Callable[[str], None]
    ) -> dict[str, Any] | None:
        """The last good state; None if the run was cut short before there was one.

        Settings that differ from the run's own are refused, but for those that change no result, unless
        `accept_changes`; then they become the run's own. `warn` is told of them, of damaged checkpoints, and of
        versions that are others now, with which the run need not end as it would have.
        """
        self._check_links()
        changes = [
            f"{key}: {change}"
            for key, change in differences(_whole_path(self.settings()), settings).items()
            if not any(f"{key}.".startswith(f"{free}.") for free in FREE)
        ]
        if changes and not accept_changes:
            message = f"{self.path}: its settings were others:\n  " + "\n  ".join(changes)
            raise ConfigError(f"{message}\nLeave them as they were, or go on with the new ones: --accept-changes")
        runs_with = lnpu.versions()
        ran_with = parse_json(read_text(self.versions), str(self.versions)) if self.versions.exists() else runs_with
        if not isinstance(ran_with, dict):
            raise ConfigError(f"{self.versions}: not a mapping of versions")
        changes += [
            f"{name}: {ran_with.get(name)} -> {now}" for name, now in runs_with.items() if now != ran_with.get(name)
        ]
        for change in changes:
            warn(f"changed: {change}")
        write_text(self.versions, _json(runs_with), own=True)
        write_text(self.config, _yaml(settings), own=True)
        newest: dict[str, Any] | None = self.checkpoints.newest(warn)
        return newest

    def _check_links(self) -> None:
        """Raises ConfigError if a file that is read, or a folder that is written into, lies elsewhere."""
        for name in ("config.yaml", "versions.json", "counts", "checkpoints", "tensorboard"):
            inside(self.path, name)

    def settings(self) -> dict[str, Any]:
        """What config.yaml holds."""
        found = parse_yaml(read_text(self.config, "run to resume"), str(self.config))
        if not isinstance(found, dict):
            raise ConfigError(f"{self.config}: not the settings of a run: a mapping of keys is expected")
        settings: dict[str, Any] = under_current_names(found)
        return settings

    def save_epoch(
        self, metrics: Sequence[Mapping[str, Any]], counts: lnpu.Counts | None, tensorboard: bool = False
    ) -> None:
        """Write what the epoch of the last row of `metrics` did."""
        if counts is not None:
            write_text(self.path / "counts" / f"epoch{metrics[-1]['epoch']}.json", counts.json_text(), own=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in metrics for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(metrics)
        write_text(self.path / "metrics.csv", text.getvalue(), own=True)
        if tensorboard:
            self._show_in_tensorboard(metrics[-1])

    def _show_in_tensorboard(self, row: Mapping[str, Any]) -> None:
        """Add a row of metrics to what TensorBoard reads. An epoch that is done anew replaces what it wrote before."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("tensorboard=true needs tensorboard: pip install 'lnpu-torch[recipes]'") from None
        with SummaryWriter(str(self.path / "tensorboard"), purge_step=row["epoch"]) as writer:
            for name, value in row.items():
                if value is not None:
                    writer.add_scalar(name, value, row["epoch"])

    def counts(self) -> list[tuple[str, lnpu.Counts]]:
        """The counts of every epoch, in order, each with its name ("epoch1", ...)."""
        names = [file.stem for file in (self.path / "counts").glob("epoch*.json")]
        in_order = sorted((name for name in names if name[5:].isdecimal()), key=lambda name: int(name[5:]))
        return [(name, lnpu.Counts.load(inside(self.path, f"counts/{name}.json"))) for name in in_order]

    def how_to_go_on(self) -> str:
        """One sentence for whom the run was cut short."""
        files = self.checkpoints.files()
        last = f"The last good checkpoint is {files[-1]}. " if files else "There is no checkpoint yet. "
        return f"{last}Go on with: lnpu train --resume {quote(str(self.path))}"


def _yaml(settings: Mapping[str, Any]) -> str:
    """Settings as text that can be read again. Raises ConfigError if it cannot, as it is too long."""
    text = yaml.safe_dump(dict(settings), sort_keys=False)
    parse_yaml(text, "config.yaml")
    return text


def _whole_path(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings whose data.path is written as it now would be, wherever that leads."""
    data = settings.get("data")
    if not isinstance(data, dict) or not isinstance(data.get("path"), str):
        return settings
    return settings | {"data": data | {"path": os.path.abspath(data["path"])}}


def _json(data: Mapping[str, str]) -> str:
    return json.dumps(data, indent=1) + "\n"

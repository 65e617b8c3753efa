"""What a training run shows on the terminal. It knows numbers and tables, and nothing of training."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any, Literal

from rich import progress
from rich.console import Console, RenderableType
from rich.status import Status
from rich.table import Table
from rich.text import Text
from torch import nn

import lnpu_torch as lnpu
from lnpu_torch.files import builtin_names, find, parse_yaml, validate
from lnpu_torch.recipes.settings import TrainConfig
from lnpu_torch.text_tables import Blocks, add_row, plain_table, si, si_over

ENERGY_EVERY_S = 1.0
"""Reading the counters waits for the device, so the energy so far is refreshed this often, in seconds."""


def start(model: nn.Module, where: str, images: str, folder: Path, emulated: bool) -> RenderableType:
    """What is trained, on what and where to."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = lnpu.coverage(model)
    held = f"{len(layers.emulated)} of {len(layers.rows)} layers with parameters are emulated, the others in float32"
    text = f"{si(parameters)} parameters; {held if emulated else 'all layers in float32'}; on {where}; {images}; "
    text += f"files in {folder}"
    return Text(text)


@contextlib.contextmanager
def compiling(tell: Callable[[str], None]) -> Iterator[None]:
    """Within the block, tell in words that loops for the CPU are being compiled, and how many have been."""
    if not importlib.util.find_spec("numba"):
        yield
        return
    from numba.core import event

    open_, done = 0, 0  # compiling one function compiles those that it calls

    def on_start(_: object, __: object) -> None:
        nonlocal open_
        open_ += 1
        if open_ == 1:
            tell(f"compiling loops once, up to a minute ({done} so far)")

    def on_end(_: object, __: object) -> None:
        nonlocal open_, done
        open_ -= 1
        done += not open_

    listener = type("Compiling", (event.Listener,), {"on_start": on_start, "on_end": on_end})()
    with event.install_listener("numba:compile", listener):
        yield


@contextlib.contextmanager
def compiling_shown(console: Console) -> Iterator[None]:
    """Within the block, a spinner at a terminal while loops are compiled; nothing elsewhere."""
    status = Status("", console=console)

    def tell(words: str) -> None:
        status.update(words)
        status.start()

    try:
        with compiling(tell) if console.is_terminal else contextlib.nullcontext():
            yield
    finally:
        status.stop()


class Progress:
    """A bar for one epoch: loss, accuracy, images/s, and the energy so far in words, if `energy` gives it.

    Until the first step is done, it says if loops are being compiled.
    """

    def __init__(
        self, console: Console, name: str, steps: int, done: int = 0, energy: Callable[[], str] | None = None
    ) -> None:
        columns = ("{task.description}", progress.BarColumn(), progress.MofNCompleteColumn(), "{task.fields[numbers]}")
        self._bar = progress.Progress(*columns, progress.TimeRemainingColumn(), console=console, transient=True)
        self._task = self._bar.add_task(name, total=steps, completed=done, numbers="")
        self._energy, self._words, self._read = energy, "", time.monotonic()
        self._compiling = compiling(lambda words: self._bar.update(self._task, numbers=words))

    def __enter__(self) -> Progress:
        self._bar.start()
        self._compiling.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._compiling.__exit__(kind, error, trace)
        self._bar.stop()

    def advance(self, loss: float, accuracy: float, images_per_s: float) -> None:
        """One step further; the numbers are those of the epoch so far."""
        if self._energy is not None and time.monotonic() - self._read >= ENERGY_EVERY_S:
            self._words, self._read = f", {self._energy()}", time.monotonic()
        numbers = f"loss {loss:.4f}, accuracy {accuracy:.2%}, {images_per_s:,.0f} images/s{self._words}"
        self._bar.update(self._task, advance=1, numbers=numbers)


def energy(counts: lnpu.Counts, chip: lnpu.Chip) -> str:
    """The energy of what was counted, in words."""
    report = lnpu.price(counts, chip)
    return f"{si(report.total.energy_pj, 'pJ')} on {report.chip}"


def columns(report: lnpu.Report) -> dict[str, float | None]:
    """What metrics.csv keeps of an epoch's price on one chip: pJ, by step too; shares; seconds of the chip."""
    total, steps = report.total, report.by("step").rows
    values: dict[str, float | None] = {"energy_pj": total.energy_pj}
    values |= {f"{row.step}_pj": row.energy_pj for row in steps}
    values |= {"fp8_share": total.fp8_share, "zero_share": total.zero_share, "time_s": report.time_s}
    return {f"{report.chip}_{name}": value for name, value in values.items()}


def epoch(row: Mapping[str, Any], epochs: int, reports: Sequence[lnpu.Report]) -> Text:
    """One epoch: its row of metrics.csv in words, and a line for what it cost on each chip."""
    lines = [
        f"epoch {row['epoch']}/{epochs}: loss {row['loss']:.4f}, train {row['train_accuracy']:.2%}, "
        f"test {row['test_accuracy']:.2%}, {row['images_per_s']:,.0f} images/s"
    ]
    if row.get("counted_steps") is not None:
        error = "unknown" if row["energy_error"] is None else f"{row['energy_error']:.2%}"
        lines[0] += f"; energy extrapolated from {row['counted_steps']} counted step(s), standard error {error}"
    if reports:
        total = reports[0].total
        lines[0] += f"; FP8 {_share(total.fp8_share)}, zeros {_share(total.zero_share)}"
    lines += [f"  {report.chip}: {cost(report, reports[0])}" for report in reports]
    return Text("\n".join(lines))


def cost(report: lnpu.Report, first: lnpu.Report) -> str:
    """Energy on the chip, with DRAM, and time, in words; each over that of the first chip."""
    total, of_first = report.total, first.total
    words = f"{si_over(total.energy_pj, 'pJ', of_first.energy_pj)} on the chip"
    if total.dram_energy_pj is not None:
        words += f", {si_over(total.all_energy_pj, 'pJ', of_first.all_energy_pj)} with DRAM"
    return f"{words}; {si_over(report.time_s, 's', first.time_s)}"


def summary(epochs: Sequence[tuple[str, lnpu.Counts]], chips: Sequence[lnpu.Chip], folder: Path) -> Blocks:
    """The run's energy on each chip, by layer, by step and by epoch; what it leaves out, and how to go on."""
    if not epochs:
        return Blocks(Text("Torch's own layers did the work (precision: float32), so nothing was counted."))
    whole = [lnpu.price(lnpu.Counts.merge(counts for _, counts in epochs), chip) for chip in chips]
    by_layer = _energies("layer", whole)
    by_step = _energies("step", whole)
    by_epoch = plain_table("Energy on the chip by epoch, without DRAM", ["epoch"], [chip.name for chip in chips])
    for name, counts in epochs:
        add_row(by_epoch, name, *(si(lnpu.price(counts, chip).total.energy_pj, "pJ") for chip in chips))
    add_row(by_epoch, "total", *(si(report.total.energy_pj, "pJ") for report in whole))
    notes = [Text(f"{report.chip}: {note}") for report in whole for note in report.notes]
    return Blocks(by_layer, by_step, by_epoch, *notes, Text(f"The run as a page: lnpu report {quote(str(folder))}"))


def _energies(key: Literal["layer", "step"], reports: Sequence[lnpu.Report]) -> Table:
    table = plain_table(f"Energy on the chip by {key}, without DRAM", [key], [report.chip for report in reports])
    for rows in zip(*(report.by(key).rows for report in reports), strict=True):
        add_row(table, getattr(rows[0], key), *(si(row.energy_pj, "pJ") for row in rows))
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def built_in() -> Iterator[tuple[str, TrainConfig, str]]:
    """The built-in recipes: name, settings, and the first line of the file's header."""
    for name in builtin_names("recipes"):
        path = find("recipes", name, "recipe")
        text = path.read_text(encoding="utf-8")
        settings = validate(TrainConfig, parse_yaml(text, str(path)), str(path))
        yield name, settings, text.splitlines()[0].removeprefix("# ")


def recipes_table() -> Table:
    """The built-in recipes: what each trains on what."""
    table = plain_table("Recipes (lnpu train NAME)", ["name", "model", "data", "of"], ["epochs", "batch"])
    for name, settings, words in built_in():
        row = (name, settings.model.name, settings.data.kind, words)
        add_row(table, *row, str(settings.epochs), str(settings.batch_size))
    return table

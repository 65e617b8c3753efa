"""A run that was stopped or damaged goes on, and ends as one that never was, to the bit."""

from __future__ import annotations

import io
import os
import signal
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from helpers.handmade import network
from helpers.small_run import EVERYTHING, QUIET, config, image_file, photographs, run, same_end
from lnpu_torch.files import ConfigError
from lnpu_torch.recipes import state
from lnpu_torch.recipes import train as recipe
from lnpu_torch.recipes.checkpoints import Checkpoints
from lnpu_torch.recipes.epoch_counter import Tallied
from lnpu_torch.recipes.interrupts import Interrupts, Stopped
from lnpu_torch.recipes.run_folder import RunFolder

RUNS: dict[str, dict[str, Any]] = {
    "fgmp": {},
    "float32": {"precision": "float32"},
    "everything": EVERYTHING,
    "counted in part": {"count": {"every": 2}, "limit": 5},
}


@pytest.mark.parametrize("name", RUNS)
def test_stopped_between_any_two_steps_and_resumed(name: str, tmp_path: Path) -> None:
    """By Ctrl-C, in one process, after every step in turn."""
    settings = {**RUNS[name], "epochs": 2}
    steps = 2 * settings.get("limit", 2)
    recipe.train(config(**settings, out=str(tmp_path / "whole")), QUIET)
    for _ in range(steps):
        with pytest.raises(Stopped) as stopped, signalled_after_a_step(signal.SIGINT):
            recipe.train(config(**settings), QUIET, resume=str(tmp_path / "cut"))
        assert stopped.value.exit_code == 130
    assert f"epoch 2, step {steps // 2} of {steps // 2}" in str(stopped.value)
    recipe.train(config(**settings), QUIET, resume=str(tmp_path / "cut"))
    for folder in ("whole", "cut"):  # serial numbers and how many were written differ, what they hold does not
        assert RunFolder(tmp_path / folder).checkpoints.files()[-1].name.endswith("epoch3-step0.pt")
    assert same_end(tmp_path / "whole", tmp_path / "cut")


class signalled_after_a_step:
    """Within the block, every step of a run is followed by a signal."""

    def __init__(self, number: signal.Signals) -> None:
        self.number, self.step = number, recipe.Run.step

    def __enter__(self) -> None:
        def step(run: recipe.Run, pieces: Any, asked: int) -> list[float]:
            signal.raise_signal(self.number)
            return self.step(run, pieces, signal.SIGINT)

        recipe.Run.step = step  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        recipe.Run.step = self.step  # type: ignore[method-assign]


@pytest.mark.parametrize(("before", "now"), [(1, 3), (3, 1), (2, 2), (3, 2)])
def test_other_ranks_take_over_what_was_counted_once(before: int, now: int, tmp_path: Path) -> None:
    counted = [Tallied(network() * rank, (1.0 * rank, 2.0)) for rank in range(1, before + 1)]
    begun: Any = run(out=str(tmp_path / "run"))
    saved = state.capture(begun)
    saved["ranks"] = [{"rng": [torch.get_rng_state()], "tallied": each.state()} for each in counted]
    begun.ranks, parts = now, []
    for rank in range(now):
        begun.accelerator = SimpleNamespace(process_index=rank, scaler=None)
        state.restore(begun, saved)
        parts.append(begun.tallied)
    assert Tallied.merge(parts) == Tallied.merge(counted)


def test_photographs_go_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    root = photographs(tmp_path / "images")
    data = {"kind": "imagefolder", "path": str(root), "size": 16, "workers": 1, "flip": True, "cutout": 4}
    settings = {**EVERYTHING, "data": data, "batch_size": 4, "limit": None, "epochs": 2}
    recipe.train(config(**settings, out=str(tmp_path / "whole")), QUIET)
    with pytest.raises(Stopped), signalled_after_a_step(signal.SIGTERM):
        recipe.train(config(**settings, out=str(tmp_path / "cut")), QUIET)
    recipe.train(config(**settings), QUIET, resume=str(tmp_path / "cut"))
    assert same_end(tmp_path / "whole", tmp_path / "cut")


def test_a_schedulers_signal_leaves_a_checkpoint_and_ends_well(tmp_path: Path) -> None:
    with (
        pytest.raises(Stopped, match=r"Stopped after epoch 1, step 1 of 2\. .*Go on with: lnpu train --resume") as stop,
        signalled_after_a_step(signal.SIGTERM),
    ):
        recipe.train(config(out=str(tmp_path / "run")), QUIET)
    assert stop.value.exit_code == 0
    state = RunFolder(tmp_path / "run").checkpoints.newest(print)
    assert state is not None and (state["epoch"], state["done"]) == (1, 1)


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    def enter() -> None:
        with Interrupts() as interrupts:
            entered.append(interrupts.asked)

    entered: list[int] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [0]


@pytest.fixture
def raising() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, though the tests may run in the background, where shells have it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_signals_act_as_before_the_second_time_and_afterwards(raising: None) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    recipe.train(config(out=str(tmp_path / "run"), checkpoint={"every": 1, "keep": 3}), QUIET)
    return tmp_path / "run"


def resumed(path: Path, accept_changes: bool = False, **changes: Any) -> str:
    """Goes on with the run; what it printed."""
    screen = io.StringIO()
    settings = config(**{"checkpoint": {"every": 1, "keep": 3}, **changes})
    recipe.train(settings, Console(file=screen, width=400), str(path), accept_changes)
    return screen.getvalue()


def test_the_last_few_checkpoints_are_kept(finished: Path) -> None:
    names = ["000004-epoch2-step1.pt", "000005-epoch2-step2.pt", "000006-epoch3-step0.pt"]
    assert sorted(file.name for file in (finished / "checkpoints").iterdir()) == names
    recipe.train(config(out=str(finished.parent / "none"), checkpoint={"keep": 0}), QUIET)
    assert not (finished.parent / "none" / "checkpoints").exists()


def test_the_highest_number_is_the_newest(tmp_path: Path) -> None:
    for number in (2, 999_999, 1_000_000):
        (tmp_path / f"{number:06d}-epoch1-step1.pt").touch()
    Checkpoints(tmp_path, 2).save({}, 1, 2)
    assert [file.name.split("-")[0] for file in Checkpoints(tmp_path, 2).files()] == ["1000000", "1000001"]


def flipped(whole: bytes) -> bytes:
    """One bit of a weight is another: nothing in the file's structure tells."""
    middle = len(whole) // 2
    return whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]


@pytest.mark.parametrize("damage", [lambda whole: whole[:999], lambda whole: b"", lambda whole: b"text", flipped])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(damage: Any, finished: Path) -> None:
    *_, older, newest = RunFolder(finished).checkpoints.files()
    rows = (finished / "metrics.csv").read_text().splitlines()
    newest.write_bytes(damage(newest.read_bytes()))
    assert f"{newest}: damaged" in (shown := resumed(finished)) and "trying the one before" in shown
    assert len((finished / "metrics.csv").read_text().splitlines()) == len(rows)
    assert RunFolder(finished).checkpoints.files()[-1].name == "000007-epoch3-step0.pt"
    assert older.exists()


def test_a_run_without_a_good_checkpoint_says_so(finished: Path) -> None:
    for file in RunFolder(finished).checkpoints.files():
        file.write_bytes(b"")
    with pytest.raises(ConfigError, match="every checkpoint in it is damaged"):
        resumed(finished)


def test_a_run_killed_before_its_first_checkpoint_begins_anew(finished: Path) -> None:
    for file in RunFolder(finished).checkpoints.files():
        file.unlink()
    rows = (finished / "metrics.csv").read_text()
    resumed(finished)
    cut = [line.split(",")[:4] for line in (finished / "metrics.csv").read_text().splitlines()]
    assert cut == [line.split(",")[:4] for line in rows.splitlines()]


def test_a_run_is_not_overwritten(finished: Path) -> None:
    with pytest.raises(ConfigError, match=f"holds a run already; choose another out=.*--resume {finished}"):
        recipe.train(config(out=str(finished)), QUIET)


def test_changed_settings_are_named_and_refused_unless_told(finished: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"epochs": 3, "lr": 0.01, "data": {"kind": "digits", "flip": True}}
    with pytest.raises(ConfigError) as refused:
        resumed(finished, **changes)
    for words in ("epochs: 2 -> 3", "lr: 0.05 -> 0.01", "data.crop: 1 -> 0", "--accept-changes"):
        assert words in str(refused.value)
    assert "momentum" not in str(refused.value)
    shown = resumed(finished, accept_changes=True, **changes)
    assert "changed: lr: 0.05 -> 0.01" in shown and "epoch 3/3" in shown
    assert RunFolder(finished).settings()["lr"] == 0.01
    resumed(finished, device="auto", **changes)  # what changes no result may change


def test_changes_that_are_accepted_take_effect(finished: Path) -> None:
    begun = recipe.Run(config(epochs=4, lr=0.2, momentum=0.5, batch_size=16, limit=3), QUIET)
    begun.open(str(finished), True)
    assert (begun.epoch, begun.done, begun.schedule.last_epoch) == (3, 0, 6)
    group = begun.optimizer.param_groups[0]
    assert group["momentum"] == 0.5
    assert 0 < group["lr"] < 0.2 and group["initial_lr"] == 0.2


def test_an_epoch_with_another_number_of_steps_begins_anew(finished: Path) -> None:
    RunFolder(finished).checkpoints.files()[-1].unlink()
    begun = recipe.Run(config(limit=3), QUIET)
    begun.open(str(finished), True)
    assert (begun.epoch, begun.done, begun.sums, begun.schedule.last_epoch) == (2, 0, [0.0] * 3, 3)


def test_another_models_checkpoint_is_refused(finished: Path) -> None:
    begun = recipe.Run(config(model={"name": "resnet18_cifar", "width": 3}), QUIET)
    with pytest.raises(ConfigError, match=r"does not fit this model or precision: .*size mismatch"):
        begun.open(str(finished), True)


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: object, file: Any) -> None:
        try:
            file.write(b"half of it")
            raise OSError(28, os.strerror(28))
        finally:
            raise RuntimeError("unexpected pos 704 vs 592")  # as torch does

    before = RunFolder(finished).checkpoints.files()
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConfigError, match=r"000007-epoch9-step0\.pt: cannot be written: .*No space left"):
        Checkpoints(finished / "checkpoints", 3).save({}, 9, 0)
    assert RunFolder(finished).checkpoints.files() == before
    assert not list(finished.glob("checkpoints/.*partial"))


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name_and_the_name_is_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power, files have what was brought to the disk, and folders the names."""
    synced: list[tuple[bool, int, int]] = []

    def note(descriptor: int) -> None:
        kept, named = os.fstat(descriptor), Checkpoints(tmp_path, 3).files()
        synced.append((stat.S_ISDIR(kept.st_mode), 0 if named else kept.st_size, len(named)))

    monkeypatch.setattr(os, "fsync", note)
    Checkpoints(tmp_path, 3).save({"weights": torch.ones(1000)}, 1, 0)
    (file,) = Checkpoints(tmp_path, 3).files()
    assert synced == [(False, file.stat().st_size, 0), (True, 0, 1)]


def test_what_a_killed_process_left_half_written_is_cleared(finished: Path) -> None:
    left = finished / "checkpoints" / ".000007-epoch3-step1.pt.partial"
    left.write_bytes(b"half of it")
    Checkpoints(left.parent, 3).save({"epoch": 1}, 3, 1)
    assert not left.exists()


def test_classes_of_the_data_that_changed_are_refused_as_another_model(tmp_path: Path) -> None:
    path = image_file(tmp_path / "x.npz", classes=3)
    data = {"kind": "npz", "path": str(path)}
    begun = run(data=data, batch_size=16, out=str(tmp_path / "run"))
    begun.save()
    image_file(path, classes=4)
    with pytest.raises(ConfigError, match="does not fit this model"):
        recipe.train(config(data=data, batch_size=16), QUIET, str(tmp_path / "run"), True)

"""Every recipe trains two steps; a run can be stopped and resumed, and never loses what it has written."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from test_data import image_file

import lnpu_torch as lnpu
from lnpu_torch.config import ConfigError, builtin_names, find, parse_yaml, validate
from lnpu_torch.recipes import show
from lnpu_torch.recipes import train as recipe
from lnpu_torch.recipes.data import Batches
from lnpu_torch.recipes.models import ModelConfig, build
from lnpu_torch.recipes.run_folder import RunFolder
from lnpu_torch.tables import si

SMALL: dict[str, Any] = {
    "model": {"name": "resnet18_cifar", "width": 2},
    "data": {"kind": "digits", "crop": 1, "flip": True},
    **{"precision": "fgmp", "epochs": 2, "batch_size": 32, "limit": 2, "lr": 0.05, "chips": ["lnpu", "dense-fp16"]},
}
QUIET = Console(quiet=True)


def config(**changes: Any) -> recipe.TrainConfig:
    return validate(recipe.TrainConfig, {**SMALL, **changes}, "test")


@pytest.mark.parametrize("name", builtin_names("recipes"))
def test_every_recipe_takes_two_steps(name: str, tmp_path: Path) -> None:
    data = parse_yaml(find("recipes", name, "recipe").read_text(), name)
    changes = {"epochs": 1, "limit": 2, "out": str(tmp_path / "run")}
    row = recipe.train(validate(recipe.TrainConfig, {**data, **changes}, name), QUIET)[-1]
    assert 0 < row["lnpu_energy_pj"] < row["dense-fp16_energy_pj"]
    assert 0 <= row["test_accuracy"] <= 1


def test_the_run_folder_holds_config_metrics_counts_and_checkpoint(tmp_path: Path) -> None:
    settings = config(out=str(tmp_path / "run"))
    rows = recipe.train(settings, QUIET)
    run = tmp_path / "run"
    files = ["checkpoint.pt", "config.yaml", "counts", "metrics.csv", "versions.json"]
    assert sorted(file.name for file in run.iterdir()) == files
    assert json.loads((run / "versions.json").read_text()) == lnpu.versions()
    saved = validate(recipe.TrainConfig, parse_yaml((run / "config.yaml").read_text(), "saved"), "saved")
    assert saved == settings
    with (run / "metrics.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in rows]
    epochs = RunFolder(run).counts()
    assert [name for name, _ in epochs] == ["epoch1", "epoch2"]
    for row, (_, counts) in zip(rows, epochs, strict=True):
        assert lnpu.price(counts, "lnpu").total.energy_pj == row["lnpu_energy_pj"]
        forward = next(entry for entry in counts.steps if entry.layer == "conv1" and entry.step == "forward")
        assert forward.slots == 2 * 32 * (8 * 8) * 2 * 9  # steps, images, pixels, filters, kernel: training steps only


@pytest.mark.parametrize("precision", ["fp8", "fp16", "float32"])
def test_precision_changes_what_is_computed(precision: str, tmp_path: Path) -> None:
    runs = [recipe.train(config(precision=p, out=str(tmp_path / p)), QUIET) for p in ("fgmp", precision)]
    assert runs[0][-1]["loss"] != runs[1][-1]["loss"]
    assert ("lnpu_energy_pj" in runs[1][-1]) == (precision != "float32")


def test_precision_and_chip_may_be_files(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("input: fp8\nweight: fp16\n")
    chip = tmp_path / "my_chip.yaml"
    chip.write_text("like: lnpu\ndescription: mine\n")
    changes = {"precision": str(tmp_path / "mine.yaml"), "chips": [str(chip)], "overrides": {"fc": None}}
    row = recipe.train(config(**changes, out=str(tmp_path / "run")), QUIET)[-1]
    assert row["my_chip_energy_pj"] > 0
    assert "fc" not in {entry.layer for _, counts in RunFolder(tmp_path / "run").counts() for entry in counts.steps}


@pytest.mark.parametrize("precision", ["fgmp", "float32"])
def test_a_run_stopped_by_ctrl_c_and_resumed_equals_one_never_stopped(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recipe.train(config(precision=precision, out=str(tmp_path / "whole")), QUIET)
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(Batches, "train", ctrl_c_in_epoch(2))
        with pytest.raises(recipe.Stopped, match=rf"epoch 2, step 2 of 2.*resume={cut}") as stopped:
            recipe.train(config(precision=precision, out=str(cut)), QUIET)
    assert stopped.value.exit_code == 130
    resumed = recipe.train(config(precision=precision, resume=str(cut)), QUIET)
    same = [{key: value for key, value in row.items() if key != "images_per_s"} for row in (*whole, *resumed)]
    assert same[:2] == same[2:]
    first, second = (torch.load(tmp_path / run / "checkpoint.pt") for run in ("whole", "cut"))
    assert first["epoch"] == second["epoch"] == 2
    for part in ("model", "thresholds"):
        assert all(torch.equal(value, second[part][name]) for name, value in first.get(part, {}).items())
    assert RunFolder(tmp_path / "whole").counts() == RunFolder(cut).counts()


def ctrl_c_in_epoch(number: int) -> Any:
    batches = Batches.train

    def train(self: Batches, seed: int, epoch: int) -> Iterator[Any]:
        for batch in batches(self, seed, epoch):
            yield batch
            if epoch == number:
                signal.raise_signal(signal.SIGINT)

    return train


def test_training_works_outside_the_main_thread_where_signals_cannot_be_caught() -> None:
    def enter() -> None:
        with recipe.Interrupts() as interrupts:
            entered.append(interrupts.asked)

    entered: list[bool] = []
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [False]


def test_ctrl_c_works_as_before_once_training_is_over(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with recipe.Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked
        with pytest.raises(KeyboardInterrupt):  # the second time
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_is_not_overwritten_and_not_resumed_with_other_settings(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    recipe.train(config(epochs=1, out=out), QUIET)
    with pytest.raises(ConfigError, match="holds a run already"):
        recipe.train(config(epochs=1, out=out), QUIET)
    with pytest.raises(ConfigError, match=r"other settings: epochs: 1 -> 2, lr: 0\.05 -> 0\.1$"):
        recipe.train(config(epochs=2, lr=0.1, resume=out), QUIET)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    out = tmp_path / "run"
    recipe.train(config(epochs=1, out=str(out)), QUIET)
    whole = (out / "checkpoint.pt").read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"no checkpoint"):
        (out / "checkpoint.pt").write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"checkpoint\.pt: damaged"):
            recipe.train(config(epochs=1, resume=str(out)), QUIET)
    (out / "checkpoint.pt").unlink()
    with pytest.raises(ConfigError, match=r"it has no checkpoint\.pt"):
        recipe.train(config(epochs=1, resume=str(out)), QUIET)
    with pytest.raises(ConfigError, match="no such run to resume"):
        recipe.train(config(resume=str(tmp_path / "nowhere")), QUIET)


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.start({"seed": 0})
    folder.save({"epoch": 1}, [{"epoch": 1}], None)

    def full(state: object, file: Any) -> None:
        try:
            file.write(b"half of it")
            raise OSError(28, os.strerror(28))
        finally:
            raise RuntimeError("unexpected pos 704 vs 592")  # as torch does

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConfigError, match=r"cannot be written: .*No space left.*The last good checkpoint is .*resume="):
        folder.save({"epoch": 2}, [{"epoch": 1}, {"epoch": 2}], None)
    assert torch.load(folder.checkpoint) == {"epoch": 1}
    assert not list(folder.path.glob(".*partial"))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = Batches.train

    def train(self: Batches, seed: int, epoch: int) -> Iterator[Any]:
        for pixels, labels in good(self, seed, epoch):
            yield (pixels * torch.nan if epoch == 2 else pixels), labels

    monkeypatch.setattr(Batches, "train", train)
    message = r"The loss is nan in epoch 2, step 1 of 2; .* output is not finite: conv1\. The last good checkpoint is"
    with pytest.raises(recipe.Stopped, match=message) as stopped:
        recipe.train(config(out=str(tmp_path / "run")), QUIET)
    assert stopped.value.exit_code == 2
    assert torch.load(tmp_path / "run" / "checkpoint.pt")["epoch"] == 1


def test_the_first_parameter_that_is_not_finite_is_named() -> None:
    model = build(ModelConfig(name="resnet18_cifar", width=2), 3, (1, 8, 8))
    assert recipe.first_not_finite(model, torch.zeros(2, 1, 8, 8)) == ""
    with torch.no_grad():
        model.get_parameter("layer2.0.conv1.weight")[0] = torch.inf
    assert recipe.first_not_finite(model, torch.zeros(2, 1, 8, 8)).endswith("layer2.0.conv1.weight")


def test_a_gradient_that_overflows_is_left_out_and_training_goes_on(tmp_path: Path) -> None:
    run = recipe.Run(config(out=str(tmp_path / "run")))
    pixels, labels = next(run.batches.train(0, 1))
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = [parameter.clone() for parameter in run.model.parameters()]
    run.step(pixels, labels, "here")
    assert all(map(torch.equal, before, run.model.parameters()))
    assert run.scaler.get_scale() == 2.0**119
    assert run.schedule.last_epoch == 0  # the learning rate waits with the weights


def test_a_new_folder_is_made_in_runs_and_threads_are_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(2)
    run = recipe.Run(config(threads=1, momentum=0.0))
    assert torch.get_num_threads() == 1
    assert (run.folder.path / "config.yaml").exists()
    assert run.folder.path.parent == Path("runs")
    assert run.folder.path.name.startswith("resnet18_cifar-fgmp-")
    assert run.optimizer.param_groups[0]["nesterov"] is False


def test_the_energy_so_far_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "ENERGY_EVERY_S", 0.0)
    screen = Console(file=io.StringIO(), force_terminal=True, width=160)
    run = recipe.Run(config(out=str(tmp_path / "run")))
    with lnpu.CostCounter(run.model) as cost:
        row = run.train_epoch(1, cost, screen, recipe.Interrupts())
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert f"loss {row['loss']:.4f}, accuracy {row['train_accuracy']:.2%}" in shown
    assert f"{si(cost.report(chip='lnpu').total.energy_pj, 'pJ')} on lnpu" in shown


@pytest.mark.parametrize("schedule", ["cosine", "onecycle"])
def test_schedules_end_low(schedule: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    rates = []
    schedules = recipe.make_schedule(optimizer, config(lr=0.1, schedule=schedule), 10)
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedules.step()
    assert max(rates) == pytest.approx(0.1, rel=0.05)
    assert (rates[0] == 0.1) == (schedule == "cosine")
    assert rates[-1] < 0.01


def test_training_follows_the_data(tmp_path: Path) -> None:
    """Channels, size and classes are the file's, not the recipe's."""
    data = {"kind": "npz", "path": str(image_file(tmp_path / "x.npz"))}
    recipe.train(config(data=data, epochs=1, batch_size=16, out=str(tmp_path / "run")), QUIET)
    state = torch.load(tmp_path / "run" / "checkpoint.pt")["model"]
    assert state["conv1.weight"].shape == (2, 3, 3, 3)
    assert state["fc.weight"].shape == (3, 16)


def test_a_single_training_image_is_not_enough(tmp_path: Path) -> None:
    path = image_file(tmp_path / "x.npz", x_train=np.zeros((1, 3, 8, 8), np.uint8), y_train=np.array([2]))
    with pytest.raises(ConfigError, match="there is only one"):
        recipe.train(config(data={"kind": "npz", "path": str(path)}, out=str(tmp_path / "run")), QUIET)


def test_a_device_that_torch_cannot_use_is_refused() -> None:
    assert recipe.pick_device("cpu") == torch.device("cpu")
    for name in ("meta", "no_such_device"):
        with pytest.raises(ConfigError, match=f"device: torch cannot use '{name}' here"):
            recipe.pick_device(name)

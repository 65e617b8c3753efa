"""Every recipe trains two steps; what a run writes and shows is what it did; every setting makes a difference."""

from __future__ import annotations

import csv
import io
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import lnpu_torch as lnpu
from helpers.handmade import network
from helpers.small_run import QUIET, config, image_file, photographs, run
from lnpu_torch.files import builtin_names, find, parse_yaml, validate
from lnpu_torch.recipes import console_output
from lnpu_torch.recipes import train as recipe
from lnpu_torch.recipes.epoch_counter import Tallied, Tally
from lnpu_torch.recipes.interrupts import Interrupts
from lnpu_torch.recipes.run_folder import RunFolder
from lnpu_torch.recipes.settings import TrainConfig
from lnpu_torch.text_tables import si

MODELS, DATA = ("alexnet", "resnet18", "vgg16"), ("cifar10", "cifar100", "imagenet")


def test_there_are_three_networks_on_three_data_sets_and_digits() -> None:
    assert builtin_names("recipes") == sorted([*(f"{m}_{d}" for m in MODELS for d in DATA), "digits_resnet18"])


def narrow_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear layers of torchvision's AlexNet and VGG16, nearly all of their weights, are 64 wide and not 4096."""
    init = torch.nn.Linear.__init__

    def narrowed(self: torch.nn.Linear, inputs: int, outputs: int, *rest: Any, **named: Any) -> None:
        init(self, *(64 if each == 4096 else each for each in (inputs, outputs)), *rest, **named)

    monkeypatch.setattr(torch.nn.Linear, "__init__", narrowed)


@pytest.mark.parametrize("name", builtin_names("recipes"))
def test_every_recipe_takes_two_steps(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On images made on the spot; photographs at the least size that torchvision takes."""
    settings = parse_yaml(find("recipes", name, "recipe").read_text(), name)
    data: dict[str, Any] = settings["data"]
    if data["kind"] == "imagefolder":
        narrow_layers(monkeypatch)
        small = {"path": str(photographs(tmp_path / "images")), "size": 64 if "alexnet" in name else 32, "workers": 0}
    elif data["kind"] == "digits":
        small = {}
    else:
        classes = int(data["kind"].removeprefix("cifar"))
        small = {"kind": "npz", "path": str(image_file(tmp_path / "x.npz", classes, 32))}
    changes = {"epochs": 1, "limit": 2, "batch_size": 2, "checkpoint": {"keep": 0}, "out": str(tmp_path / "run")}
    row = recipe.train(validate(TrainConfig, {**settings, "data": {**data, **small}, **changes}, name), QUIET)[-1]
    assert 0 < row["lnpu_energy_pj"] < row["dense-fp16_energy_pj"]
    assert 0 <= row["test_accuracy"] <= 1


@pytest.mark.parametrize("name", builtin_names("recipes"))
def test_every_recipe_says_what_to_expect(name: str) -> None:
    header = [line for line in find("recipes", name, "recipe").read_text().splitlines() if line.startswith("#")]
    words = "\n".join(header)
    assert "epochs" in words and "accuracy" in words and "fgmp" in words and "float32" in words
    assert "not measured" in words or "+-" in words


def test_the_run_folder_holds_settings_metrics_counts_and_checkpoints(tmp_path: Path) -> None:
    settings, folder = config(out=str(tmp_path / "run"), tensorboard=True), tmp_path / "run"
    rows = recipe.train(settings, QUIET)
    names = ["checkpoints", "config.yaml", "counts", "metrics.csv", "tensorboard", "versions.json"]
    assert sorted(file.name for file in folder.iterdir()) == names
    assert json.loads((folder / "versions.json").read_text()) == lnpu.versions()
    assert validate(TrainConfig, parse_yaml((folder / "config.yaml").read_text(), "saved"), "saved") == settings
    with (folder / "metrics.csv").open() as file:
        assert [float(row["loss"]) for row in csv.DictReader(file)] == [row["loss"] for row in rows]
    epochs = RunFolder(folder).counts()
    assert [name for name, _ in epochs] == ["epoch1", "epoch2"]
    for row, (_, counts) in zip(rows, epochs, strict=True):
        assert row["images"] == 2 * 32
        report = lnpu.price(counts, "lnpu")
        assert report.total.energy_pj == row["lnpu_energy_pj"] and report.time_s == row["lnpu_time_s"]
        steps = report.by("step").rows
        assert [step.step for step in steps] == ["forward", "grad_input", "grad_weight", "backward", "update"]
        assert [step.energy_pj for step in steps] == [row[f"lnpu_{step.step}_pj"] for step in steps]
        forward = next(entry for entry in counts.steps if entry.layer == "conv1" and entry.step == "forward")
        assert forward.macs == 2 * 32 * (8 * 8) * 2 * 9  # steps, images, pixels, filters, kernel: training steps only


@pytest.mark.filterwarnings("ignore")  # of tensorboard's own reader
def test_tensorboard_has_the_rows_of_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = recipe.train(config(out=str(tmp_path / "run"), tensorboard=True), QUIET)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("loss", "test_accuracy", "lnpu_energy_pj"):
        assert [(e.step, np.float32(e.value)) for e in events.Scalars(name)] == [
            (row["epoch"], np.float32(row[name])) for row in rows
        ]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return recipe.train(config(epochs=1, limit=6, out=str(tmp_path_factory.mktemp("plain") / "run")), QUIET)


@pytest.mark.parametrize("precision", ["fp8", "fp16", "float32"])
def test_precision_changes_what_is_computed(precision: str, tmp_path: Path, plain: list[dict[str, Any]]) -> None:
    changed = recipe.train(config(precision=precision, epochs=1, limit=6, out=str(tmp_path / "run")), QUIET)
    assert changed[-1]["loss"] != plain[-1]["loss"]
    assert "lnpu_energy_pj" in plain[-1] and ("lnpu_energy_pj" in changed[-1]) == (precision != "float32")


def test_precision_and_chip_may_be_files_and_a_chip_one_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("input: fp8\nweight: fp16\n")
    chip = tmp_path / "my_chip.yaml"
    chip.write_text("like: lnpu\ndescription: mine\n")
    changes = {"precision": str(tmp_path / "mine.yaml"), "chip": str(chip), "overrides": {"fc": None}}
    row = recipe.train(config(**changes, epochs=1, out=str(tmp_path / "run")), QUIET)[-1]
    assert row["my_chip_energy_pj"] > 0
    assert "fc" not in {entry.layer for _, counts in RunFolder(tmp_path / "run").counts() for entry in counts.steps}


KNOBS: dict[str, dict[str, Any]] = {
    "amp": {"amp": True},
    "label_smoothing": {"label_smoothing": 0.0},
    "momentum": {"momentum": 0.0},
    "weight_decay": {"weight_decay": 0.1},
    "schedule": {"schedule": "cosine"},
    "accumulate": {"accumulate": 2},
    "seed": {"seed": 1},
    "cutout": {"data": {"kind": "digits", "cutout": 4}},
}


@pytest.mark.parametrize("knob", KNOBS)
def test_every_knob_changes_the_run(knob: str, tmp_path: Path, plain: list[dict[str, Any]]) -> None:
    changed = recipe.train(config(**KNOBS[knob], epochs=1, limit=6, out=str(tmp_path / "run")), QUIET)
    assert changed[-1]["loss"] != plain[-1]["loss"]


def test_the_average_of_the_weights_is_what_is_tested(tmp_path: Path) -> None:
    begun = run(ema=0.75, out=str(tmp_path / "run"), limit=None, batch_size=200)
    begun.accelerator.scaler._init_scale = 1024.0  # so that no step is left out
    states = []
    for pieces in itertools.islice(begun.batches.train(1), 2):
        begun.step(pieces, 0)
        states.append({name: value.clone() for name, value in begun.model.state_dict().items()})
    assert begun.average is not None
    average = begun.average.module
    for name in ("conv1.weight", "bn1.running_mean"):  # weights and statistics
        first, second = (state[name] for state in states)
        assert not torch.equal(first, second)
        expected = 0.75 * first + 0.25 * second
        assert torch.allclose(average.state_dict()[name], expected, atol=1e-7)  # type: ignore[union-attr, operator]
    begun.test_accuracy()
    thresholds = lnpu.thresholds(begun.model)
    assert all(torch.equal(t, thresholds[name]) for name, t in lnpu.thresholds(average).items())  # type: ignore[arg-type]
    with torch.no_grad():
        average.fc.weight.zero_()  # type: ignore[union-attr, operator]
        average.fc.bias.copy_(torch.arange(10) == 3)  # type: ignore[union-attr, operator]
    threes = torch.cat([labels for _, labels in begun.batches.test()]) == 3
    assert begun.test_accuracy() == threes.double().mean().item()


def test_pieces_in_time_make_the_same_step(tmp_path: Path) -> None:
    """Without batch norm and dropout, and in float32, a batch in four pieces is that batch, but for rounding."""
    changes: dict[str, Any] = {
        "model": {"name": "vgg16_cifar", "width": 2, "batch_norm": False},
        "precision": "float32",
    }
    changes |= {"data": {"kind": "digits", "size": 32}, "epochs": 1}
    whole, pieces = (
        recipe.train(config(**changes, accumulate=n, out=str(tmp_path / str(n))), QUIET)[-1] for n in (1, 4)
    )
    assert whole["loss"] == pytest.approx(pieces["loss"], rel=1e-5)
    assert whole["train_accuracy"] == pieces["train_accuracy"]


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
def test_compiled_training_is_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile is asked for, and what it returns is trained; its quickest backend stands for all."""
    compile_, asked = torch.compile, []

    def quick(model: torch.nn.Module) -> Any:
        asked.append(model)
        return compile_(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", quick)
    changes: dict[str, Any] = {"model": {"name": "alexnet_cifar", "width": 2}, "epochs": 1, "channels_last": True}
    changes["data"] = {"kind": "digits", "size": 16}
    eager, compiled = (
        recipe.train(config(**changes, compile=switch, out=str(tmp_path / f"{switch}")), QUIET)[-1]
        for switch in (False, True)
    )
    assert len(asked) == 1
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-3)  # dropout's draws alike, sums in another order
    assert compiled["lnpu_grad_weight_pj"] == pytest.approx(eager["lnpu_grad_weight_pj"], rel=0.05)


def test_every_nth_step_can_stand_for_the_others(tmp_path: Path) -> None:
    """What is extrapolated errs by about as much as it says, changes nothing in training, and is marked.

    The last of the 12 batches has 29 images in place of 128, and stands for itself.
    """
    changes: dict[str, Any] = {"epochs": 1, "limit": None, "batch_size": 128}
    changes |= {"model": {"name": "alexnet_cifar", "width": 2}, "data": {"kind": "digits", "size": 16}}
    full, some, one = (
        recipe.train(config(**changes, count={"every": n}, out=str(tmp_path / str(n))), QUIET)[-1] for n in (1, 5, 12)
    )
    assert some["loss"] == full["loss"] == one["loss"]
    assert (some["counted_steps"], one["counted_steps"], one["energy_error"]) == (3, 1, None)
    error = some["lnpu_energy_pj"] / full["lnpu_energy_pj"] - 1
    assert 0 < abs(error) < 3 * some["energy_error"] < 0.3
    assert "counted_steps" not in full
    counts = [RunFolder(tmp_path / n).counts()[0][1] for n in ("1", "5")]
    assert [each.extrapolated for each in counts] == [False, True]
    assert [entry.macs for entry in counts[0].steps] == [entry.macs for entry in counts[1].steps]
    words = console_output.epoch(some, 1, [lnpu.price(counts[1], "lnpu")]).plain
    assert f"extrapolated from 3 counted step(s), standard error {some['energy_error']:.2%}" in words


@pytest.mark.parametrize("every", range(1, 8))
def test_like_steps_are_counted_as_often_as_they_were_taken(every: int) -> None:
    """Six steps of four rows and a last one of three, whichever of them are counted."""
    layer, rows = lnpu.convert(torch.nn.Linear(2, 5)), [4] * 6 + [3]
    with Tally(layer, 6, every, "lnpu", Tallied()) as tally:
        for number, count in enumerate(rows):
            with tally.step(number):
                layer(torch.ones(count, 2)).sum().backward()
    forward, *_ = tally.so_far.counts.steps
    assert (forward.macs, forward.calls) == (sum(rows) * 2 * 5, len(rows))
    assert len(tally.so_far.energies_pj) == (len(range(0, 6, every)) if every > 1 else 0)


def test_the_standard_error_is_that_of_steps_drawn_without_replacement() -> None:
    """Squared and meant over every way to draw three of six, it is the variance of their means."""
    energies = (3.0, 4.0, 7.0, 7.5, 11.0, 30.0)
    drawn = list(itertools.combinations(energies, 3))
    errors = [Tallied(energies_pj=each).error(6) for each in drawn]
    squares = [(error * statistics.mean(each)) ** 2 for error, each in zip(errors, drawn, strict=True) if error]
    assert len(squares) == 20
    assert statistics.mean(squares) == pytest.approx(statistics.pvariance(map(statistics.mean, drawn)))
    assert Tallied(energies_pj=energies).error(6) == 0
    assert Tallied.merge([Tallied(energies_pj=(1.0, 2.0)), Tallied(energies_pj=(4.0, 8.0))]).energies_pj == (5.0, 10.0)


def test_an_epochs_line_has_shares_and_each_chips_energy_and_time(tmp_path: Path) -> None:
    """Without DRAM and with it, and how many times the first chip's they are."""
    screen = Console(file=io.StringIO(), width=120)
    row = recipe.train(config(epochs=1, out=str(tmp_path / "run")), screen)[-1]
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    shares = f"FP8 {row['lnpu_fp8_share']:.1%}, zeros {row['lnpu_zero_share']:.1%}"
    assert next(line for line in lines if line.startswith("epoch 1/1")).endswith(f" images/s; {shares}")
    counts = lnpu.Counts.load(tmp_path / "run" / "counts" / "epoch1.json")
    ours, dense = (lnpu.price(counts, chip) for chip in ("lnpu", "dense-fp16"))
    energy, both, time = (si(ours.total.energy_pj, "pJ"), si(ours.total.all_energy_pj, "pJ"), si(ours.time_s, "s"))
    assert f"  lnpu: {energy} on the chip, {both} with DRAM; {time}" in lines
    (line,) = (line for line in lines if line.startswith("  dense-fp16: "))
    for mine, its in (
        (ours.total.energy_pj, dense.total.energy_pj),
        (ours.total.all_energy_pj, dense.total.all_energy_pj),
        (ours.time_s, dense.time_s),
    ):
        assert f"({its / mine:.2f}x)" in line


def test_the_summary_has_layers_steps_and_epochs_on_each_chip() -> None:
    epochs, chips = [("epoch1", network()), ("epoch2", network() * 3)], [lnpu.chip("lnpu"), lnpu.chip("dense-fp16")]
    folder = Path("runs/a run")
    blocks = console_output.summary(epochs, chips, folder)._blocks()  # as they are before a column gets one unit
    screen = Console(file=io.StringIO(), width=160)
    screen.print(*blocks)
    lines = {" ".join(line.split()) for line in screen.file.getvalue().splitlines()}
    whole = [lnpu.price(network() * 4, chip) for chip in chips]
    expected = {"total": [report.total for report in whole]}
    expected |= {name: [lnpu.price(counts, chip).total for chip in chips] for name, counts in epochs}
    for key in ("layer", "step"):
        rows = zip(*(report.by(key).rows for report in whole), strict=True)
        expected |= {getattr(each[0], key): list(each) for each in rows}
    assert {f"{name} {' '.join(si(row.energy_pj, 'pJ') for row in rows)}" for name, rows in expected.items()} <= lines
    assert any("The run as a page: lnpu report 'runs/a run'" in line for line in lines)


def test_the_energy_so_far_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_output, "ENERGY_EVERY_S", 0.0)
    screen = Console(file=io.StringIO(), force_terminal=True, width=160)
    begun = run(screen, out=str(tmp_path / "run"))
    tallied, _ = begun.train_epoch(Interrupts())
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    loss, right, seen = begun.sums
    assert f"loss {loss / seen:.4f}, accuracy {right / seen:.2%}" in shown
    assert console_output.energy(tallied.counts, "lnpu") in shown

"""`lnpu train` and `lnpu recipes`: what they print, and one clear message for whatever a user can get wrong."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.command import lnpu_command, refused
from lnpu_torch.cli import train as cli_train
from lnpu_torch.files import builtin_names
from lnpu_torch.recipes import train as recipe
from lnpu_torch.recipes.interrupts import Stopped
from lnpu_torch.recipes.settings import TrainConfig

SMALL = ["epochs=1", "limit=2", "batch_size=32", "model.width=2", "data.size=8"]


def test_train_prints_each_epoch_and_keeps_the_run(tmp_path: Path) -> None:
    result = lnpu_command("train", "digits_resnet18", *SMALL, "chip=[lnpu, sparse-inference]", f"out={tmp_path}/a run")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    for words in (
        f"lnpu report '{tmp_path}/a run'",
        "21 of 41 layers with parameters are emulated",
        "epoch 1/1: loss",
        "grad_weight",
        "sparse-inference",
        "Energy on the chip by layer, without DRAM",
        "layer4.1.conv2",
    ):
        assert words in said
    counts_file = f"{tmp_path}/a run/counts/epoch1.json"
    priced = lnpu_command("price", counts_file, "--by", "step", "--format", "json")
    row = next(csv.DictReader((tmp_path / "a run" / "metrics.csv").read_text().splitlines()))
    assert json.loads(priced.stdout)["total"]["energy_pj"] == float(row["lnpu_energy_pj"])


def test_resume_goes_on_with_a_run_or_begins_it(tmp_path: Path) -> None:
    run, first = f"{tmp_path}/run", ["digits_resnet18", *SMALL]
    for arguments in ([*first, "--resume", run], ["--resume", run], [f"{run}/config.yaml", "--resume", run]):
        result = lnpu_command("train", *arguments)
        assert result.exit_code == 0, result.output
    message = refused("train", "--resume", run, "epochs=2", "lr=1")
    assert "epochs: 1 -> 2" in message and "lr: 0.1 -> 1" in message and "--accept-changes" in message
    longer = lnpu_command("train", "--resume", run, "epochs=2", "--accept-changes")
    assert longer.exit_code == 0 and "epoch 2/2" in longer.stdout
    assert "no such run to resume" in refused("train", "--resume", f"{tmp_path}/nowhere")
    assert "a recipe is needed (lnpu recipes lists them), or --resume RUN" in refused("train")
    assert "a recipe is needed" in refused("train", "epochs=2")


def test_recipes_are_listed() -> None:
    listed = lnpu_command("recipes").stdout
    assert all(name in listed for name in builtin_names("recipes"))
    assert "torchvision's AlexNet on ImageNet" in listed


def test_train_in_float32_says_that_nothing_is_counted(tmp_path: Path) -> None:
    result = lnpu_command("train", "digits_resnet18", *SMALL, "precision=float32", f"out={tmp_path}/run")
    assert result.exit_code == 0, result.output
    assert "nothing was counted" in result.stdout


BAD_SETTINGS = {
    "unknown key 'lrr' (nearest: lr); known: model, data,": ["lrr=1"],
    "unknown key 'data.sice' (nearest: size); known: kind, path": ["data.sice=1"],
    "lr: Input should be a valid number, got 'fast'": ["lr=fast"],
    "seed: Input should be a valid integer, got 1.5": ["seed=1.5"],
    "epochs: Input should be greater than or equal to 1, got 0": ["epochs=0"],
    "'epochs': settings are written KEY=VALUE": ["epochs"],
    "'=3': settings are written KEY=VALUE": ["=3"],
    "chip: not valid YAML": ["chip=[lnpu"],
    "lr.max: 'max' is inside 0.1, which has no keys": ["lr.max=1"],
    "unknown model 'resnet81'": ["model.name=resnet81"],
    "unknown chip 'lnpo'": ["chip=lnpo"],
    "unknown precision 'fp9'": ["precision=fp9"],
    "override 'fcc' matches no layer that can be emulated (nearest: fc)": ["overrides.fcc=fp8"],
    "nowhere.npz: no such data file": ["data.kind=npz", "data.path=nowhere.npz"],
    "device: Input should be 'auto', 'cpu' or 'cuda', got 'tpu9'": ["device=tpu9"],
    "batch_size: 31 images cannot be shared evenly": ["batch_size=31", "accumulate=2"],
    "CIFAR10 is not in 'nowhere'": ["data.kind=cifar10", "data.path=nowhere"],
    "nowhere: no such folder (data.path)": ["data.kind=imagefolder", "data.path=nowhere", "data.crop=0"],
    "model.classes: 1000 outputs, but the data has 10 classes": ["model.classes=1000"],
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_a_wrong_setting_is_refused(message: str, tmp_path: Path) -> None:
    assert message in refused("train", "digits_resnet18", *SMALL, f"out={tmp_path}/run", *BAD_SETTINGS[message])
    assert not (tmp_path / "run").exists()


def test_a_wrong_recipe_is_refused(tmp_path: Path) -> None:
    assert "unknown recipe 'digits'" in refused("train", "digits")
    assert "digits_resnet18" in refused("train", "digits")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    assert "not a recipe" in refused("train", f"{tmp_path}/list.yaml")
    (tmp_path / "twice.yaml").write_text("lr: 1\nlr: 2")
    assert "key 'lr' stands twice" in refused("train", f"{tmp_path}/twice.yaml")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = refused("train", "digits_resnet18", *SMALL, f"out={tmp_path}/file/run")
    assert f"{tmp_path}/file/run: cannot be made: Not a directory" in message


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install 'lnpu-torch[recipes]'" in refused("train", "digits_resnet18", f"out={tmp_path}/run")


@pytest.mark.parametrize("code", [0, 2, 130])
def test_a_run_that_stops_ends_with_its_message_and_code(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise Stopped("The loss is nan [in] epoch 3", code)

    monkeypatch.setattr(recipe, "train", stop)
    result = lnpu_command("train", "digits_resnet18")
    assert (result.exit_code, result.stderr.strip()) == (code, "The loss is nan [in] epoch 3")


def test_of_several_processes_the_first_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    result = lnpu_command("train", "nothing_like_it")
    assert (result.exit_code, result.stderr) == (2, "")


def test_ctrl_c_before_training_has_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "train", interrupt)
    result = lnpu_command("train", "digits_resnet18")
    assert (result.exit_code, result.stderr.strip()) == (130, "Stopped.")


def test_settings_are_yaml_under_dotted_keys() -> None:
    start: dict[str, Any] = {"lr": 1, "data": {"kind": "npz", "size": 8}}
    settings = ["lr=2e-3", "data.size=null", "data.flip=true", "chip=[a, b]", "overrides.fc=null", "out=a=b"]
    assert cli_train.with_settings(start, settings, TrainConfig) == {
        "lr": 2e-3,
        "data": {"kind": "npz", "size": None, "flip": True},
        "chip": ["a", "b"],
        "overrides": {"fc": None},
        "out": "a=b",
    }
    assert start == {"lr": 1, "data": {"kind": "npz", "size": 8}}

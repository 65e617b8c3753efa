"""What a run holds of its settings: what the files said that they name, whole paths, and a folder of its own."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lnpu_torch as lnpu
from helpers.command import lnpu_command, refused
from helpers.setting_files import FGMP, FILES, FP8, NAMED, SMALL, write_files
from helpers.small_run import QUIET, config, image_file, same_end
from lnpu_torch.cli.train import read_recipe
from lnpu_torch.files import ConfigError
from lnpu_torch.integrations.cost_log import CostLog
from lnpu_torch.recipes import train as recipe
from lnpu_torch.recipes.run_folder import RunFolder
from lnpu_torch.reporting.run_reader import read_run


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of files, stopped after its first step."""
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    step = recipe.Run.step

    def stop(run: recipe.Run, *arguments: Any) -> list[float]:
        sums = step(run, *arguments)
        return [*sums[:3], 15]

    with monkeypatch.context() as patch:
        patch.setattr(recipe.Run, "step", stop)
        stopped = lnpu_command("train", "digits_resnet18", *SMALL, *NAMED, "out=run")
    assert "Stopped after epoch 1, step 1 of 2" in stopped.stderr, stopped.output
    return tmp_path / "run"


@pytest.mark.parametrize("setting", FILES)
def test_a_file_that_changed_is_refused_and_named(setting: str, begun: Path) -> None:
    name, before, changed, said = FILES[setting]
    file = begun.parent / name
    file.write_text(changed)
    message = refused("train", "--resume", "run")
    assert f"{said} (in {file})" in message and "--accept-changes" in message
    for other, *_, others in FILES.values():
        assert (others in message) == (other == name)
    assert said in refused("train", "digits_resnet18", *SMALL, *NAMED, "--resume", "run")
    assert "changed: " + said in lnpu_command("train", "--resume", "run", "--accept-changes").stdout.replace("\n", "")
    assert lnpu_command("train", "--resume", "run").exit_code == 0  # it holds the changed one now
    file.write_text(before)
    assert file.name in refused("train", "--resume", "run")


def test_a_run_goes_on_from_another_folder_and_without_its_files(
    begun: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = lnpu_command("train", "digits_resnet18", *SMALL, *NAMED, "out=whole")
    assert whole.exit_code == 0, whole.output
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    Path("p.yaml").write_text(FP8)  # another one of that name
    for name, *_ in FILES.values():
        (tmp_path / name).unlink()
    done = lnpu_command("train", "--resume", "../run")
    assert done.exit_code == 0, done.output
    assert same_end(begun, tmp_path / "whole")
    assert [chip if isinstance(chip, str) else chip.name for chip in read_run(begun).chips] == ["lnpu", "mine"]


def test_a_run_whose_chip_has_the_names_of_an_older_version_goes_on(begun: Path) -> None:
    older = (begun / "config.yaml").read_text()
    for now, then in (("skipped_mac_pj", "skipped_slot_pj"), ("sync_interval", "run"), ("balance_group", "balancer")):
        older, count = re.subn(rf"(?m)^( +){now}:", rf"\1{then}:", older)
        assert count == 1
    (begun / "config.yaml").write_text(older)
    done = lnpu_command("train", "--resume", "run")
    assert done.exit_code == 0, done.output
    (begun / "config.yaml").write_text(older)
    assert [chip if isinstance(chip, str) else chip.name for chip in read_run(begun).chips] == ["lnpu", "mine"]


def test_a_report_shows_the_names_of_files_and_prices_what_they_said(begun: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert lnpu_command("train", "--resume", "run").exit_code == 0
    for name, *_ in FILES.values():
        (tmp_path / name).unlink()
    done = lnpu_command("report", "run", "--json", "all.json")
    assert done.exit_code == 0, done.output
    assert all(str(tmp_path / name) in (begun / "report.html").read_text() for name, *_ in FILES.values())
    data = yaml.safe_load((tmp_path / "all.json").read_text())
    assert data["settings"]["precision"] == str(tmp_path / "p.yaml")
    assert [chip["chip"] for chip in data["chips"]] == ["lnpu", "mine"]


def test_a_runs_settings_are_a_recipe_that_needs_no_files(begun: Path, tmp_path: Path) -> None:
    for name, _, changed, _ in FILES.values():
        (tmp_path / name).write_text(changed)
    resolved = read_recipe("run/config.yaml", ["out=again"]).holding_files()
    assert resolved.for_any_folder() | {"out": "run"} == RunFolder(begun).settings()


def test_data_are_found_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    image_file(tmp_path / "images.npz")
    data = {"kind": "npz", "path": "images.npz"}
    recipe.train(config(data=data, batch_size=16, epochs=1, out="run"), QUIET)
    recipe.train(config(data=data, batch_size=16, epochs=1), QUIET, resume="run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert lnpu_command("train", "--resume", "../run").exit_code == 0
    (tmp_path / "images.npz").unlink()
    assert f"{tmp_path / 'images.npz'}: no such data file (data.path)" in refused("train", "--resume", "../run")


def test_a_relative_path_of_an_earlier_version_is_the_same_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    image_file(tmp_path / "images.npz")
    settings = config(data={"kind": "npz", "path": "images.npz"}, batch_size=16).model_dump(mode="json")
    RunFolder("run").start(settings)
    now = config(data={"kind": "npz", "path": "images.npz"}, batch_size=16).for_any_folder()
    assert RunFolder("run").resume(now, False, pytest.fail) is None


def test_cifar_is_looked_for_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    held = config(data={"kind": "cifar10"}).for_any_folder()
    assert held["data"]["path"] == str(tmp_path / "data")
    assert config().for_any_folder()["data"]["path"] is None


def log(folder: Path, precision: Any, **settings: Any) -> CostLog:
    costs = CostLog(precision, folder=folder, **settings)
    costs.convert(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)))
    return costs


def test_a_cost_log_holds_what_files_and_objects_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    rule = lnpu.Rule(fp16_share=0.25)
    settings: dict[str, Any] = {"overrides": {"0": rule}, "chips": ["c.yaml", lnpu.chip("lnpu-fp16")]}
    costs = log(tmp_path / "run", Path("p.yaml"), **settings)
    costs.start()
    costs.begin_epoch()
    costs.end_epoch(1)
    log(tmp_path / "run", "p.yaml", **settings).start(resumed=True)
    (tmp_path / "p.yaml").write_text(FP8)
    with pytest.raises(
        ConfigError, match=r"other settings(.|\n)*precision\.input\.high: fp16 -> None \(in .*p\.yaml\)"
    ):
        log(tmp_path / "run", "p.yaml", **settings).start(resumed=True)
    with pytest.raises(ConfigError, match=r"overrides\.0\.fp16_share: 0\.25 -> 0\.5"):
        other = {**settings, "overrides": {"0": lnpu.Rule(fp16_share=0.5)}}
        (tmp_path / "p.yaml").write_text(FGMP)
        log(tmp_path / "run", "p.yaml", **other).start(resumed=True)
    assert [chip.name for chip in read_run(tmp_path / "run").chips] == ["mine", "lnpu-fp16"]  # type: ignore[union-attr]


def test_a_cost_log_begins_where_a_resumed_training_has_no_log_yet(tmp_path: Path) -> None:
    log(tmp_path / "run", "fp8").start(resumed=True)
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["precision"] == "fp8"


def test_runs_that_begin_in_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "now")
    for seed in range(3):
        recipe.train(config(seed=seed, epochs=1, limit=1), QUIET)
    names = [f"resnet18_cifar-fgmp-now{end}" for end in ("", "-2", "-3")]
    assert sorted(file.name for file in (tmp_path / "runs").iterdir()) == names
    assert [RunFolder(tmp_path / "runs" / name).settings()["seed"] for name in names] == [0, 1, 2]


@pytest.mark.parametrize("which", ["a run", "a log"])
def test_of_several_runs_in_one_folder_one_has_it(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They all have looked before the first one writes, as on a slow disk."""
    together, write = threading.Barrier(3, timeout=60), yaml.safe_dump

    def wait(*arguments: Any, **options: Any) -> str:
        together.wait()
        return str(write(*arguments, **options))

    monkeypatch.setattr(yaml, "safe_dump", wait)
    refusals: list[str] = []

    logs = [CostLog("fp8", folder=tmp_path / "run", overrides={f"number {seed}": None}) for seed in range(3)]
    for each in logs:
        each.convert(torch.nn.Linear(1, 1), complete=False)

    def begin(seed: int) -> None:
        try:
            if which == "a run":
                RunFolder(tmp_path / "run").start({"precision": f"number {seed}"})
            else:
                logs[seed].start()
        except ConfigError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=begin, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refusals) == 2 and all("holds a run already" in each for each in refusals)
    assert [file.name for file in (tmp_path / "run").glob(".*")] == []


def test_a_run_may_begin_in_a_folder_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "slurm.out").touch()
    RunFolder(tmp_path / "run").start({})
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file: cannot be made"):
        RunFolder(tmp_path / "file").start({})


def test_a_run_cut_short_as_it_began_is_gone_on_with(tmp_path: Path) -> None:
    settings = config(epochs=1, limit=1)
    RunFolder(tmp_path / "run").start(settings.for_any_folder())
    (tmp_path / "run" / "versions.json").unlink()
    recipe.train(settings, QUIET, resume=str(tmp_path / "run"))
    assert (tmp_path / "run" / "counts" / "epoch1.json").exists()


def test_settings_that_could_not_be_read_again_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="characters of YAML"):
        RunFolder(tmp_path / "run").start({"chip": ["x" * 1000] * 300})
    assert not (tmp_path / "run" / "config.yaml").exists()

"""Settings as they are given on the command line: text stays text, and whoever gave a wrong value is blamed."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.command import lnpu_command, refused
from helpers.setting_files import SMALL, write_files
from helpers.small_run import QUIET, config, image_file
from lnpu_torch.cli.train import read_recipe
from lnpu_torch.recipes import train as recipe

TEXTS = (
    "run #3",
    "123456",
    "no",
    "1e5",
    "0x10",
    "a: b",
    "[x]",
    "2020-01-01",
    "true",
    "'x'",
    " x ",
    "~x",
    "x~",
    "",
    "-",
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_taken_as_it_is_given(text: str) -> None:
    npz = ("data.kind=npz", f"data.path={text or 'x'}")
    found = read_recipe("digits_resnet18", [f"out={text}", f"precision={text}", f"overrides.fc={text}", *npz])
    assert (found.out, found.precision, found.overrides["fc"]) == (text or None, text, text or None)
    assert found.data.path == (text or "x")


@pytest.mark.parametrize("text", [text for text in TEXTS if not text.startswith("[")])
def test_a_chip_is_taken_as_it_is_given(text: str) -> None:
    assert read_recipe("digits_resnet18", [f"chip={text}"]).chip == (text,)


def test_lists_and_null_are_yaml() -> None:
    settings = ["chip=[a b.yaml, no, 1e5, '#']", "overrides={fc: null, conv: no}", "out=null", "data.path=null"]
    found = read_recipe("digits_resnet18", settings)
    assert found.chip == ("a b.yaml", "no", "1e5", "#")
    assert found.overrides == {"fc": None, "conv": "no"}
    assert (found.out, found.data.path) == (None, None)


def test_the_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    write_files(home)
    image_file(home / "images.npz")
    data = ("data.kind=npz", "data.path=~/images.npz", "data.size=8")
    named = ("precision=~/p.yaml", "chip=[lnpu, ~/c.yaml]", "overrides.fc=~/o.yaml", "out=~/runs/a")
    done = lnpu_command("train", "digits_resnet18", *SMALL, *data, "batch_size=16", "epochs=1", *named)
    assert done.exit_code == 0, done.output
    counts = "~/runs/a/counts/epoch1.json"
    for command in (
        ("train", "--resume=~/runs/a"),
        ("price", counts, "--chip=~/c.yaml"),
        ("sweep", counts, "--set", "macs_per_cycle.fp16=96", "--no-plot", "--out=~/swept"),
        ("report", "~/runs/a", "--plots=~/plots", "--json=~/a.json", "--csv=~/a.csv", "--out=~/a.html"),
        ("chips", "~/c.yaml"),
    ):
        assert lnpu_command(*command).exit_code == 0, command
    assert {"swept.csv", "plots", "a.json", "a.csv", "a.html", "runs"} <= {file.name for file in home.iterdir()}
    assert not list(here.iterdir())


def test_the_one_who_gave_a_wrong_value_is_blamed(tmp_path: Path) -> None:
    assert refused("train", "digits_resnet18", "lr=fast").startswith("command line: lr: ")
    assert refused("train", "digits_resnet18", "data.kind=npz").startswith("command line: data: ")
    assert refused("reproduce", "seed=x").startswith("command line: seed: ")
    (tmp_path / "r.yaml").write_text("epochs: 1\nout: 123456\nlr: 0.1\n")
    message = refused("train", f"{tmp_path}/r.yaml", "lr=0.2")
    assert "r.yaml: out: Input should be a valid string, got 123456" in message and "command line" not in message


@pytest.mark.parametrize("seed", [2**64 - 1, 2**63])
def test_a_seed_may_be_as_large_as_torchs(seed: int, tmp_path: Path) -> None:
    recipe.train(config(seed=seed, epochs=1, limit=1, out=str(tmp_path / "run")), QUIET)


@pytest.mark.parametrize("command", [("train", "digits_resnet18"), ("reproduce",)])
def test_a_seed_beyond_torchs_is_refused(command: tuple[str, ...]) -> None:
    assert "seed: Input should be less than 18446744073709551616" in refused(*command, f"seed={2**64}")

"""What docs/security.md promises: files are data. None runs code, leaves its folder, or becomes part of a page."""

from __future__ import annotations

import ast
import io
import os
import pickle
import random
import re
import zipfile
from collections import Counter
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from helpers.command import lnpu_command, refused
from helpers.loading import nothing_happens
from helpers.paths import ROOT
from helpers.run_by_hand import epoch_counts, write_run
from lnpu_torch import ConfigError
from lnpu_torch.files import inside
from lnpu_torch.integrations.cost_log import CostLog
from lnpu_torch.recipes import state
from lnpu_torch.recipes.arrays import load as load_images
from lnpu_torch.recipes.checkpoints import Checkpoints
from lnpu_torch.recipes.run_folder import RunFolder
from lnpu_torch.recipes.settings import DataConfig
from lnpu_torch.reporting.run_reader import read_run

SOURCES = [file for folder in ("lnpu_torch", "recipes", "kernels") for file in (ROOT / folder).rglob("*.py")]
FORBIDDEN = re.compile(
    r"(eval|exec|compile|__import__|os\.(system|popen)|(pickle|marshal|shelve|dill)\..*|.*unsafe_load)"
)
ASKED = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
RUNS_CODE = {"dispatch.py", "importing.py", "torchvision_compat.py", "photographs.py"}
"""Import modules by name: of the user's own only app.py, for MODULE:ATTR."""


def calls(file: Path) -> list[tuple[str, ast.Call]]:
    return [
        (ast.unparse(node.func), node) for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
    ]


def test_no_source_unpickles_or_evaluates_what_it_reads() -> None:
    for file in SOURCES:
        for name, call in calls(file):
            compiled = (file.name, name) == (
                "numba_jit.py",
                "pickle.loads",
            )  # code that this package has compiled and kept
            assert compiled or not FORBIDDEN.fullmatch(name), f"{file.name}:{call.lineno}: {name}"
            if name in ASKED:
                given = {each.arg: ast.literal_eval(each.value) for each in call.keywords if each.arg == ASKED[name][0]}
                assert given == dict([ASKED[name]]), f"{file.name}:{call.lineno}: {name}"
            assert not any(each.arg == "shell" for each in call.keywords), f"{file.name}:{call.lineno}"
            if name == "yaml.load":
                assert file.name == "files.py" and ast.unparse(call.args[1]) == "_Loader"
    importing = {file.name for file in SOURCES for name, _ in calls(file) if name == "importlib.import_module"}
    assert importing <= RUNS_CODE


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder, bomb = tmp_path / "checkpoints", tmp_path / "exploded"
    folder.mkdir()
    torch.save({"epoch": Bomb(bomb)}, folder / "000001-epoch1-step1.pt")
    said: list[str] = []
    with nothing_happens(), pytest.raises(ConfigError, match="every checkpoint in it is damaged"):
        Checkpoints(folder, 2).newest(said.append)
    assert "damaged, or not a checkpoint" in said[0] and not bomb.exists()
    pickle.loads(pickle.dumps(Bomb(bomb)))
    assert bomb.exists()  # so it would have


def test_a_checkpoint_that_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    torch.save({"epoch": 1}, tmp_path / "elsewhere.pt")
    (tmp_path / "checkpoints" / "000001-epoch1-step1.pt").symlink_to(tmp_path / "elsewhere.pt")
    said: list[str] = []
    with pytest.raises(ConfigError, match="damaged"):
        Checkpoints(tmp_path / "checkpoints", 2).newest(said.append)
    assert "leads out of" in said[0]


def test_damaged_pickles_in_a_whole_archive_are_refused(tmp_path: Path) -> None:
    """Their checksums are right, so that torch's own reader meets them."""
    buffer, file, chance = io.BytesIO(), tmp_path / "000001-epoch1-step1.pt", random.Random(0)
    torch.save({"epoch": 1, "model": {"weight": torch.ones(3)}, "metrics": [{"loss": 0.5}]}, buffer)
    for _ in range(150):
        with zipfile.ZipFile(buffer) as whole, zipfile.ZipFile(file, "w") as damaged:
            for name in whole.namelist():
                content = bytearray(whole.read(name))
                for _ in range(chance.randint(0, 3) if name.endswith("data.pkl") else 0):
                    content[chance.randrange(len(content))] = chance.randrange(256)
                damaged.writestr(name, bytes(content))
        with nothing_happens(), suppress(ConfigError):
            assert isinstance(Checkpoints(tmp_path, 2).newest(lambda _: None), dict)


def test_images_that_would_run_code_are_refused(tmp_path: Path) -> None:
    arrays = dict.fromkeys(("x_train", "y_train", "x_test", "y_test"), np.array([Bomb(tmp_path / "exploded")], object))
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(ConfigError, match="not a readable"):
        load_images(DataConfig(kind="npz", path=str(tmp_path / "images.npz")))
    assert not (tmp_path / "exploded").exists()


STATE = {"epoch": 2, "done": 0, "steps": 2, "updates": 2, "metrics": [{"epoch": 1}], "ranks": []}
WRONG = [
    *({key: value} for key in ("epoch", "done", "steps", "updates") for value in ("../x", -1, 1.5, True, None)),
    *({"metrics": value} for value in ([{"epoch": "/../../x"}], [{}], ["row"], {}, None)),
    {"ranks": None},
]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_numbers_of_a_checkpoint_are_numbers(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="not one of a run"):
        state.restore(None, STATE | change)  # type: ignore[arg-type]


def test_links_do_not_lead_out_of_a_run(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("password: 1234\n")
    for name in ("config.yaml", "metrics.csv", "versions.json", "counts/epoch1.json"):
        run = write_run(tmp_path / name.replace("/", "-"), epochs=1)
        (run / name).unlink()
        (run / name).symlink_to(secret)
        with pytest.raises(ConfigError, match="leads out of") as error:
            read_run(run)
        assert "1234" not in str(error.value) + refused("report", str(run))
        if name == "config.yaml":
            assert "1234" not in refused("train", "--resume", str(run))
    for name in ("../secret", "/etc/passwd", "a\0b"):
        with pytest.raises(ConfigError, match="leads out of"):
            inside(tmp_path / "config.yaml", name)


@pytest.mark.parametrize("name", ["counts", "checkpoints", "tensorboard"])
def test_a_run_whose_folders_lie_elsewhere_is_not_resumed(name: str, tmp_path: Path) -> None:
    settings = {"precision": "fgmp"}
    RunFolder(tmp_path / "run").start(settings)
    (tmp_path / "elsewhere").mkdir()
    if (tmp_path / "run" / name).exists():
        (tmp_path / "run" / name).rmdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="leads out of"):
        RunFolder(tmp_path / "run").resume(settings, False, print)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_run_does_not_write_through_links(tmp_path: Path) -> None:
    """Nor into pipes: nobody would read them, and the run would wait for ever."""
    pytest.importorskip("matplotlib")
    precious, run = tmp_path / "precious", write_run(tmp_path / "run", epochs=1)
    precious.write_text("mine")
    (run / "report.html").symlink_to(precious)
    assert lnpu_command("report", str(run)).exit_code == 0
    folder, names = RunFolder(run), ("metrics.csv", "counts/epoch7.json", "checkpoints/000001-epoch8-step0.pt")
    for name in names:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name) if name == "metrics.csv" else (run / name).symlink_to(precious)
    folder.save_epoch([{"epoch": 7}], epoch_counts(1))
    assert precious.read_text() == "mine"
    for name in ("report.html", *names[:2]):
        assert (run / name).is_file() and not (run / name).is_symlink(), name
    folder.checkpoints.save({"epoch": 1}, 8, 0)
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("name", ["counts", "checkpoints", "tensorboard"])
def test_a_run_is_not_begun_where_its_folders_lie_elsewhere(name: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="leads out of"):
        RunFolder(tmp_path / "run").start({"precision": "fgmp"})
    assert not list((tmp_path / "elsewhere").iterdir())


def test_cost_log_does_not_write_through_links(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").symlink_to(tmp_path / "precious")
    log = CostLog(folder=tmp_path / "run")
    log.convert(torch.nn.Linear(4, 2))
    log.start()
    log.begin_epoch()
    log.end_epoch(1)
    assert (tmp_path / "precious").read_text() == "mine"


EVIL = "<script>alert(1)</script>--><img src=x onerror=alert(2)>\"'$x^$ {{ 7 * 7 }} ]]>"


class Elements(HTMLParser):
    """Counts tags, and collects attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.attributes = Counter[str](), set[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {name for name, _ in attrs}


def reported(folder: Path, word: str) -> str:
    """The page of a run in which everything that has a name has this one."""
    settings = {"model": {"name": word}, "precision": word, word: word, "chip": [str(folder / "c.yaml")]}
    run = write_run(folder / f"run {word.replace('/', '|')}", epochs=1)
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    (run / "versions.json").write_text(f'{{"torch": {yaml.safe_dump(word, default_style=chr(34))}}}')
    counts = epoch_counts(1)
    steps = tuple(each.model_copy(update={"layer": word, "kind": word}) for each in counts.steps[:3])
    counts.model_copy(update={"steps": steps}).save(run / "counts" / "epoch1.json")
    tagged = {"value": "free", "tag": "assumed", "source": word}
    (folder / "c.yaml").write_text(
        yaml.safe_dump({"like": "lnpu", "name": word, "description": word, "padding": tagged})
    )
    done = lnpu_command("report", str(run))
    assert done.exit_code == 0, done.output
    return (run / "report.html").read_text()


def test_names_are_text_wherever_they_stand(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    page = reported(tmp_path, EVIL)
    found = Elements(page)
    assert page.count("alert(1)") > 8 and "{{ 7 * 7 }}" in page
    assert (found.tags["script"], found.tags["img"]) == (1, 0)
    assert not any(name.startswith("on") for name in found.attributes)


def test_only_profile_runs_code_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil.py").write_text("import pathlib\npathlib.Path('exploded').touch()\n")
    monkeypatch.chdir(tmp_path)
    epoch_counts(1).save("counts.json")
    for arguments in (
        ("price", "counts.json", "--chip", "evil:attr"),
        ("chips", "evil:attr"),
        ("report", "evil:attr"),
        ("train", "evil:attr"),
        ("train", "digits_resnet18", "precision=evil:attr"),
        ("train", "digits_resnet18", "model.name=evil:attr"),
    ):
        assert lnpu_command(*arguments).exit_code == 2
        assert not Path("exploded").exists()
    lnpu_command("profile", "evil:attr", "--input-shape", "1")
    assert Path("exploded").exists()

"""What is said of numbers beyond measure, marks in files, output that nobody reads: a message, and no traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lnpu_torch as lnpu
from helpers.command import lnpu_command, refused
from helpers.run_by_hand import epoch_counts, write_run
from helpers.small_run import QUIET, config, image_file
from lnpu_torch.cli.app import main
from lnpu_torch.files import ConfigError, read_text, validate
from lnpu_torch.hardware.chip import Chip, chip
from lnpu_torch.recipes import train as recipe
from lnpu_torch.recipes.checkpoints import Checkpoints
from lnpu_torch.reporting.run_reader import read_run

COMMAND = [sys.executable, "-c", "import sys; sys.argv[0] = 'lnpu'; from lnpu_torch.cli.app import main; main()"]


@pytest.fixture
def counted(tmp_path: Path) -> str:
    epoch_counts(1).save(tmp_path / "counts.json")
    return str(tmp_path / "counts.json")


def test_metrics_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = write_run(tmp_path / "run", epochs=3, settings="note: .inf\n")
    metrics = (folder / "metrics.csv").read_text()
    for cell in ("inf", "-inf", "NaN", "1e400", "1e308", "nan"):
        (folder / "metrics.csv").write_text(metrics.replace("2,0.5,0.75,", f"2,{cell},{cell},"))
        assert cell in (folder / "metrics.csv").read_text()
        assert [epoch.metrics.keys() for epoch in read_run(folder).epochs][1] == {"epoch"}, cell
    assert lnpu_command("report", str(folder), "--json", f"{tmp_path}/all.json").exit_code == 0
    data = json.loads((tmp_path / "all.json").read_text(), parse_constant=pytest.fail)
    assert data["metrics"][1] == {"epoch": 2} and data["metrics"][2]["loss"] == 1 / 3
    assert data["settings"]["note"] is None


@pytest.mark.parametrize("times", [2**55, 2**63, 10**24])
def test_counts_beyond_64_bits_are_priced_and_shown(times: int, tmp_path: Path, counted: str) -> None:
    pytest.importorskip("matplotlib")
    folder, many = write_run(tmp_path / "run", epochs=2), epoch_counts(1) * times
    many.save(folder / "counts" / "epoch1.json")
    assert lnpu_command("report", str(folder), "--json", f"{tmp_path}/all.json").exit_code == 0
    for command in (("price",), ("sweep", "--set", "macs_per_cycle.fp16=1,96", "--out", f"{tmp_path}/swept")):
        assert lnpu_command(*command, f"{folder}/counts/epoch1.json").exit_code == 0
    one, all_ = (lnpu.price(counts, "lnpu").total.energy_zj["mac"] for counts in (epoch_counts(1), many))
    assert all_ == times * one


def times(data: Any, factor: int) -> Any:
    """Plain data of counts with every number so many times as large."""
    if isinstance(data, dict):
        kept = ("version", "channels", "extrapolated")
        return {key: value if key in kept else times(value, factor) for key, value in data.items()}
    if isinstance(data, list):
        return [times(value, factor) for value in data]
    return data * factor if isinstance(data, int) else data


@pytest.mark.parametrize("factor", [10**30, 10**308, 10**400])
@pytest.mark.parametrize("command", [("price",), ("sweep", "--set", "macs_per_cycle.fp16=96")], ids=str)
def test_counts_beyond_a_float_are_refused(factor: int, command: tuple[str, ...], tmp_path: Path) -> None:
    data = times(json.loads(epoch_counts(1).json_text()), factor)
    (tmp_path / "counts.json").write_text(json.dumps(data))
    message = refused(*command, f"{tmp_path}/counts.json")
    assert "counts.json: steps.0.macs: Input should be less than or equal to 1000" in message


def largest(data: Any) -> Any:
    """A chip's plain data with the largest number that is allowed in every place that takes any."""
    if isinstance(data, dict):
        bounded = ("lanes", "operating_point", "sram", "sram_size", "idle_w")
        free = {key: value for key, value in data.items() if key not in bounded}
        return data | {key: largest(value) for key, value in free.items()}
    return 10**30 if type(data) is int else 1e30 if isinstance(data, float) else data


def test_no_chip_makes_a_figure_that_no_float_holds() -> None:
    data = chip("lnpu").model_dump(mode="json")
    for entry in (*data["energy"].values(), data["simd"]["operations_per_cycle"], data["dram_bytes_per_s"]):
        if entry and "range" in entry:
            entry["range"] = None
    for part in ("energy", "storage", "macs_per_cycle", "simd"):
        data[part] = largest(data[part])
    priced = lnpu.price(epoch_counts(10**24), validate(Chip, data, "test"))
    assert 0 < priced.total.energy_pj < float("inf") and priced.time_s < float("inf")  # type: ignore[operator]
    assert json.loads(json.dumps(priced.to_dict()), parse_constant=pytest.fail)


WRONG_CHIPS = {
    "energy.fp8_mac_pj=1e300": "energy.fp8_mac_pj.value: Input should be less than or equal to 1000",
    f"macs_per_cycle.fp16={10**400}": "macs_per_cycle.fp16.value: Input should be less than or equal to 1000",
    "operating_point.low.clock_hz=1e-300": "clock_hz.value: below 1e-30, got 1e-300",
}


@pytest.mark.parametrize("setting", WRONG_CHIPS)
def test_constants_beyond_measure_are_refused(setting: str, counted: str) -> None:
    assert WRONG_CHIPS[setting] in refused("sweep", counted, "--set", setting)


@pytest.mark.parametrize(
    ("where", "polynomial", "said"),
    [
        ("measured_in", [0.0, 0.0, 0.0], "measured_in has no energy at measured_at_v"),
        ("chip_in", [-1.0, 0.0, 0.0], "energies are -.* times the measured ones"),
        ("chip_in", [1e300, 0.0, 0.0], "energies are .* times the measured ones"),
    ],
)
def test_energies_of_a_process_that_has_none_are_refused(where: str, polynomial: list[float], said: str) -> None:
    data = chip("lnpu").model_dump(mode="json")
    data["bottom_up"]["arithmetic"][where]["polynomial"]["value"] = polynomial
    with pytest.raises(ConfigError, match=said):
        validate(Chip, data, "test")


@pytest.mark.parametrize("shape", ["99999999999,4", "99999999999999999999999,4", "9223372036854775807,3"])
def test_an_input_that_no_memory_holds_is_refused(shape: str) -> None:
    message = refused("profile", "torch.nn:Identity", "--input-shape", shape)
    assert message.startswith("--input-shape: a batch of shape (") and "frame #" not in message


LARGE = {
    "model.width=1000000000": "out of memory",
    "model.width=2000000000": "out of memory",
    f"model.width={10**30}": "model.width: Input should be less than 2147483648",
    "data.size=10000000": "out of memory",
    f"data.size={10**30}": "data.size: Input should be less than 2147483648",
    f"limit={10**30}": "limit: Input should be less than 2147483648",
    f"batch_size={10**30}": "batch_size: Input should be less than 2147483648",
    f"threads={10**30}": "threads: Input should be less than or equal to 1024",
    f"data.workers={10**30}": "data.workers: Input should be less than or equal to 1024",
}


@pytest.mark.parametrize("setting", LARGE)
def test_settings_beyond_measure_are_refused(setting: str, tmp_path: Path) -> None:
    small = ("epochs=1", "limit=1", "batch_size=8", "model.width=1", f"out={tmp_path}/run")
    assert LARGE[setting] in refused("train", "digits_resnet18", *small, setting)
    assert not (tmp_path / "run").exists()


def test_a_batch_may_be_larger_than_the_data(tmp_path: Path) -> None:
    settings = config(batch_size=2**31 - 2, epochs=1, limit=1, data={"kind": "digits"}, out=str(tmp_path / "run"))
    assert recipe.train(settings, QUIET)[0]["epoch"] == 1


@pytest.mark.parametrize("part", ["y_train", "y_test"])
@pytest.mark.parametrize("label", [10**12, 10**9, 10**5, 2**64 - 1])
def test_labels_that_can_be_no_classes_are_refused(label: int, part: str, tmp_path: Path) -> None:
    labels = np.array([label, *range(3)] * 11, np.uint64)[: 33 if part == "y_train" else 9]
    path = image_file(tmp_path / "images.npz", **{part: labels})
    message = refused("train", "digits_resnet18", "data.kind=npz", f"data.path={path}", f"out={tmp_path}/run")
    assert f"{part}: labels must be classes, counted from 0; {label} is none of 100000" in message


STRAY = (
    "epoch2 (copy).json",
    "epoch.json",
    "epochs.json",
    "epoch02.json",
    "epoch-1.json",
    "epoch\uff12.json",
    "._epoch1.json",
)


@pytest.mark.parametrize("name", STRAY)
def test_other_files_beside_the_counts_are_not_read(name: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", epochs=2)
    (folder / "counts" / name).write_text("no counts")
    assert [epoch.number for epoch in read_run(folder).epochs] == [1, 2]


def test_other_files_beside_the_checkpoints_are_left_alone(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    for epoch in (1, 2, 3):
        checkpoints.save({"epoch": epoch}, epoch, 0)
        shutil.copy(checkpoints.files()[-1], tmp_path / f"{epoch:06d}-epoch{epoch}-step0 (copy).pt")
        (tmp_path / f"{99 - epoch}-epochs.pt").touch()
    assert [file.name for file in checkpoints.files()] == ["000003-epoch3-step0.pt"]
    assert len(list(tmp_path.iterdir())) == 1 + 3 + 3
    assert checkpoints.newest(pytest.fail) == {"epoch": 3}


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    """Windows' editors and spreadsheets write them before everything."""
    pytest.importorskip("matplotlib")
    folder = write_run(tmp_path / "run", epochs=2)
    for name in ("metrics.csv", "config.yaml", "versions.json", "counts/epoch1.json"):
        (folder / name).write_text((folder / name).read_text(), encoding="utf-8-sig")
    assert read_run(folder) == read_run(write_run(tmp_path / "same" / "run", epochs=2))
    assert lnpu_command("report", str(folder)).exit_code == 0
    (tmp_path / "p.yaml").write_text("\ufeffinput: fp8\n", encoding="utf-8")
    assert read_text(tmp_path / "p.yaml") == "input: fp8\n"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("ascii", r"\xe9\U0001f40e"), ("latin-1", "\u00e9" + r"\U0001f40e"), ("utf-8", "\u00e9\U0001f40e")],
)
def test_what_a_terminal_cannot_show_is_an_escape(
    encoding: str, shown: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    folder = write_run(tmp_path / "\u00e9\U0001f40e", epochs=1)

    def run(*arguments: str) -> tuple[object, str, str]:
        """The exit code, and what a terminal of that encoding got on stdout and stderr."""
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding) for name in ("stdout", "stderr")}
        monkeypatch.setattr(sys, "argv", ["lnpu", *arguments])
        for name, stream in streams.items():
            monkeypatch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as ended:
            main()
        for stream in streams.values():
            stream.flush()
        return ended.value.code, *(stream.buffer.getvalue().decode(encoding) for stream in streams.values())  # type: ignore[attr-defined]

    code, output, errors = run("report", str(folder))
    assert (code, errors) == (0, "") and f"{shown}/report.html" in output
    code, output, errors = run("price", f"{folder}/none")
    assert (code, output) == (2, "") and f"{shown}/none: no such" in errors


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are UTF-8")
def test_a_name_that_is_no_text_is_an_escape_too(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "run", epochs=1).rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    done = subprocess.run([*COMMAND, "report", b"\xff"], cwd=tmp_path, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"udcff" in done.stdout.lower()


@pytest.mark.parametrize("command", ["price", "chips"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_is_no_error(command: str, unbuffered: str, counted: str) -> None:
    """Printed by us, or by rich."""
    arguments = ["price", counted, "--format", "json"] if command == "price" else ["chips", "lnpu"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does after its lines
    done = subprocess.run([*COMMAND, *arguments], env=environment, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_output_may_be_closed() -> None:
    done = subprocess.run(["sh", "-c", '"$@" chips lnpu >&-', "sh", *COMMAND], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")

"""What is read of a run's folder, and what is said of one that is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers.run_by_hand import epoch_counts, write_run
from lnpu_torch.cli.app import app
from lnpu_torch.files import ConfigError
from lnpu_torch.reporting import run_reader
from lnpu_torch.reporting.run_reader import merged, read_run


def test_epochs_come_in_their_order_with_the_metrics_that_are_numbers(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", epochs=11))
    assert (run.name, run.chips, run.versions) == ("run", ["lnpu", "dense-fp16"], {"torch": "9.9"})
    assert [epoch.number for epoch in run.epochs] == list(range(1, 12))
    assert run.epochs[1].metrics == {"epoch": 2.0, "loss": 0.5, "test_accuracy": 0.75}
    assert run.epochs[10].counts == epoch_counts(1)


WRONG: list[tuple[str, str, str]] = [
    ("config.yaml", "", "not the settings of a run"),
    ("metrics.csv", "loss\n1\n", "a first column `epoch` is expected"),
    ("metrics.csv", "epoch,loss\n1," + "1" * 2**18, "a first column `epoch` is expected"),
    ("counts/epoch1.json", "{", "not valid JSON"),
    ("versions.json", "[]", "not a mapping of versions"),
]


@pytest.mark.parametrize(("file", "text", "said"), WRONG)
def test_a_damaged_folder_is_a_message(file: str, text: str, said: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", epochs=1)
    (run / file).write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_run(run)
    done = CliRunner().invoke(app, ["report", str(run)])
    assert done.exit_code == 2 and "Traceback" not in done.output


def test_a_run_that_counted_nothing_and_one_that_is_not_there(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", epochs=0)
    with pytest.raises(ConfigError, match="no epoch of this run was counted"):
        read_run(run)
    with pytest.raises(ConfigError, match="no such run"):
        read_run(tmp_path / "nowhere")


def test_of_a_large_run_epochs_stand_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "run", epochs=25)
    monkeypatch.setattr(run_reader, "SOON_READ", 1)
    run = read_run(folder, soon=True)
    assert [epoch.number for epoch in run.epochs] == [2, 5, 7, 10, 12, 15, 17, 20, 22, 25]
    assert [epoch.stands_for for epoch in run.epochs] == [2, 3] * 5
    assert run.length == 25 and run.left_out and run.left_out.startswith("10 of 25 epochs were read")
    whole = merged(run.epochs)
    assert whole.extrapolated and whole.steps[0].macs == epoch_counts(1).steps[0].macs * sum(
        (26 - epoch.number) * epoch.stands_for for epoch in run.epochs
    )
    monkeypatch.setattr(run_reader, "SOON_READ", 10**9)
    for every in (read_run(folder), read_run(folder, soon=True)):
        assert len(every.epochs) == 25 and every.left_out is None and not merged(every.epochs).extrapolated


def test_what_training_writes_is_what_the_report_reads(tmp_path: Path) -> None:
    settings = ["model.width=2", "epochs=2", "limit=2", f"out={tmp_path / 'run'}"]
    trained = CliRunner().invoke(app, ["train", "digits_resnet18", *settings])
    assert trained.exit_code == 0, trained.output
    run = read_run(tmp_path / "run")
    assert [epoch.number for epoch in run.epochs] == [1, 2]
    assert all(0 <= epoch.metrics["test_accuracy"] <= 1 for epoch in run.epochs)
    assert CliRunner().invoke(app, ["report", str(tmp_path / "run")]).exit_code == 0
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()

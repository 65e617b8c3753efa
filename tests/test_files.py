"""Where files are written: into what a path leads to, whole or not at all, and never over a pipe, link or terminal."""

from __future__ import annotations

import os
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lnpu_torch as lnpu
from helpers.command import lnpu_command
from helpers.run_by_hand import epoch_counts, write_run
from lnpu_torch.cost.sweep import sweep
from lnpu_torch.files import ConfigError, create_text, write, write_text
from lnpu_torch.hardware.chip import chip
from lnpu_torch.reporting.sweep_plot import save_plot


def swept() -> Any:
    return sweep(epoch_counts(1), [chip("lnpu")], {"macs_per_cycle.fp16": [384, 768]})


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda path: write_text(path, "text"),
    "counts": epoch_counts(1).save,
    "report.json": lambda path: lnpu.price(epoch_counts(1), "lnpu").to_json(path),
    "report.csv": lambda path: lnpu.price(epoch_counts(1), "lnpu").to_csv(path),
    "sweep.csv": lambda path: swept().to_csv(path),
    "plot.png": lambda path: save_plot(swept(), path),
    "plot.svg": lambda path: save_plot(swept(), path),
}
EVERY_WRITER = pytest.mark.parametrize("name", WRITERS)


def needs(name: str) -> None:
    if name.startswith("plot"):
        pytest.importorskip("matplotlib")


def mode(path: Path) -> str:
    return stat.filemode(path.lstat().st_mode)


def read_from(pipe: Path) -> tuple[threading.Thread, list[bytes]]:
    """A thread that reads the pipe to its end."""
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(pipe.read_bytes()), daemon=True)
    thread.start()
    return thread, found


@EVERY_WRITER
def test_a_pipe_stays_and_gets_what_is_written(name: str, tmp_path: Path) -> None:
    needs(name)
    pipe = tmp_path / name
    os.mkfifo(pipe)
    thread, found = read_from(pipe)
    WRITERS[name](pipe)
    thread.join(20)
    assert mode(pipe) == "prw-r--r--"
    assert len(found[0]) >= 4
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_terminal_stays_and_gets_what_is_written(tmp_path: Path) -> None:
    master, slave = os.openpty()
    terminal = Path(os.ttyname(slave))
    write_text(terminal, "text")
    assert os.read(master, 100) == b"text"
    assert mode(terminal)[0] == "c"
    os.close(slave)
    os.close(master)


@EVERY_WRITER
def test_links_are_followed_and_modes_kept(name: str, tmp_path: Path) -> None:
    needs(name)
    (tmp_path / "there").mkdir()
    target = tmp_path / "there" / "target"
    target.touch()
    target.chmod(0o600)
    (tmp_path / "first").symlink_to("there/target")
    (tmp_path / name).symlink_to("first")
    before = target.stat().st_ino
    WRITERS[name](tmp_path / name)
    assert (tmp_path / name).is_symlink() and (tmp_path / "first").is_symlink()
    assert mode(target) == "-rw-------"
    assert target.stat().st_size and target.stat().st_ino != before  # replaced, and so whole at any time
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["target"]


def test_a_private_file_is_private_while_it_is_written(tmp_path: Path) -> None:
    def look(file: Any) -> None:
        modes.append(stat.filemode(os.fstat(file.fileno()).st_mode))

    modes: list[str] = []
    (tmp_path / "private").touch(0o600)
    write(tmp_path / "private", look)
    write(tmp_path / "new", look)
    umask = os.umask(0o022)
    os.umask(umask)
    assert modes == ["-rw-------", stat.filemode(stat.S_IFREG | 0o666 & ~umask)]


def test_a_link_to_nothing_makes_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "text"


def circle(folder: Path) -> Path:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    return folder / "a"


def lost(folder: Path) -> Path:
    (folder / "lost").symlink_to("nowhere/target")
    return folder / "lost"


WRONG: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a folder": (lambda folder: folder, "Is a directory"),
    "links in a circle": (circle, "symbolic links"),
    "a link into no folder": (lost, "No such file or directory"),
    "in no folder": (lambda folder: folder / "nowhere" / "file", "No such file or directory"),
    "no name": (lambda folder: folder / "a\0b", "null (byte|character)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_written_is_a_message(name: str, tmp_path: Path) -> None:
    place, said = WRONG[name]
    path = place(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=f"cannot be written: .*{said}"):
        write_text(path, "text")
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_is_as_it_was_if_writing_ends_early(tmp_path: Path) -> None:
    def half(file: Any) -> None:
        file.write(b"half of it")
        raise KeyboardInterrupt

    (tmp_path / "file").write_text("earlier")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "file", half)
    assert (tmp_path / "file").read_text() == "earlier"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_long_name_is_no_longer_while_it_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / ("x" * 255), "text")
    assert (tmp_path / ("x" * 255)).read_text() == "text"


def test_a_new_file_is_made_by_one_of_several(tmp_path: Path) -> None:
    create_text(tmp_path / "file", "first")
    with pytest.raises(FileExistsError):
        create_text(tmp_path / "file", "second")
    assert (tmp_path / "file").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_new_file_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, os.strerror(1))

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    test_a_new_file_is_made_by_one_of_several(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # is multi-threaded
@pytest.mark.parametrize("redirected", ["a file", "a pipe"])
def test_our_own_output_is_written_into(redirected: str, tmp_path: Path) -> None:
    """A name that leads there, such as /dev/fd/1; in a process of its own, whose output is a file or pipe."""
    place = tmp_path / "output"
    reader, writer = os.pipe() if redirected == "a pipe" else (None, os.open(place, os.O_WRONLY | os.O_CREAT))
    if not (child := os.fork()):
        try:
            os.dup2(writer, 1)
            with open(1, "w", closefd=False) as sys.stdout:  # as Python opens it, with a buffer
                print("before")
                write_text("/dev/fd/1", "text\n")
                print("after")
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    if reader is not None:
        with open(reader, "rb") as pipe:
            place.write_bytes(pipe.read())
    assert place.read_text() == "before\ntext\nafter\n"


def test_the_command_writes_into_pipes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", epochs=1)
    options = ("out", "json", "csv")
    for option in options:
        os.mkfifo(tmp_path / option)
    threads = [read_from(tmp_path / option) for option in options]
    done = lnpu_command("report", str(run), *(part for name in options for part in (f"--{name}", f"{tmp_path}/{name}")))
    assert done.exit_code == 0, done.output
    for thread, found in threads:
        thread.join(20)
        assert len(found[0]) > 1000
    assert not (run / "report.html").exists()
    assert all(mode(tmp_path / option)[0] == "p" for option in options)


def test_plots_in_a_folder_are_written_through_links(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", epochs=1)
    (tmp_path / "plots").mkdir()
    for name in ("energy_by_epoch.png", "energy_by_epoch.svg"):
        (tmp_path / name).touch(0o600)
        (tmp_path / "plots" / name).symlink_to(tmp_path / name)
    assert lnpu_command("report", str(run), "--plots", str(tmp_path / "plots")).exit_code == 0
    for name in ("energy_by_epoch.png", "energy_by_epoch.svg"):
        assert (tmp_path / "plots" / name).is_symlink() and (tmp_path / name).stat().st_size
        assert mode(tmp_path / name) == "-rw-------"

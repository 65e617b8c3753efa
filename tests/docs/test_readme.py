"""The README's example runs as it stands, and its picture and links are there."""

import glob
import itertools
import re
import shlex

from helpers.command import lnpu_command, refused
from helpers.paths import ROOT
from helpers.run_by_hand import write_run

README = (ROOT / "README.md").read_text()


def test_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "2 of 2 layers emulated" in printed and "Energy on chip lnpu" in printed
    assert (tmp_path / "step.json").stat().st_size > 0


def test_links_lead_somewhere():
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+?)\)", page.read_text()):
            assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_targets_are_in_the_makefile():
    targets = re.findall(r"(?:`|^    )make (\w+)", README, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert {"train", "test", "docs"} <= set(targets) and all(f"\n{target}:" in makefile for target in targets)


def test_commands_are_the_programs(tmp_path, monkeypatch):
    """The README's own command lines, on a run that was made by hand."""
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^    lnpu (.*)$", README, re.MULTILINE)]
    assert [command[0] for command in commands] == ["price", "report"]
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "runs" / "one", epochs=12)
    write_run(tmp_path / "runs" / "two", epochs=12)
    for command in commands:
        found = [glob.glob(word) if "*" in word else [word] for word in command]
        done = lnpu_command(*itertools.chain.from_iterable(found))
        assert done.exit_code == 0, done.output
    assert all((tmp_path / "runs" / run / "report.html").is_file() for run in ("one", "two"))
    several = [str(tmp_path / "runs" / run) for run in ("one", "two")]
    assert "--out, --json: of one run, not of 2" in refused("report", *several, "--out", "a", "--json", "b")


def test_lines_are_short_enough_for_a_page():
    """Code and printed text within 100 columns; no printed text longer than eight lines."""
    for block in re.findall(r"```(?:text|diff)\n(.*?)```", README, re.DOTALL):
        assert len(block.splitlines()) <= 9 and max(map(len, block.splitlines())) <= 100, block
    assert all(len(line) <= 110 for line in README.splitlines() if line.startswith("    "))

"""The README's example runs as it stands, and its picture and links are there."""

import glob
import itertools
import re
import shlex

from helpers.command import lnpu_command, refused
from helpers.handmade import network
from helpers.paths import ROOT
from helpers.run_by_hand import write_run
from lnpu_torch.cost.pricing import price
from lnpu_torch.recipes.console_output import epoch

README = (ROOT / "README.md").read_text()


def test_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "2 of 2 layers emulated" in printed and "chip and DRAM of lnpu by step" in printed
    assert (tmp_path / "step.json").stat().st_size > 0


def test_an_epoch_is_shown_as_it_is_printed():
    """Digits and prefixes aside."""
    row = {"epoch": 12, "loss": 0.5, "train_accuracy": 1.0, "test_accuracy": 1.0, "images_per_s": 9.0}
    printed = epoch(row, 12, [price(network(), chip) for chip in ("lnpu", "dense-fp16")]).plain.splitlines()
    assert len(printed) == 3
    for page in (README, (ROOT / "docs" / "recipes.md").read_text()):
        start = next(i for i, line in enumerate(page.splitlines()) if line.strip().startswith("epoch 12/12: loss"))
        assert list(map(shape, page.splitlines()[start : start + 3])) == list(map(shape, printed))


def shape(line):
    return re.sub(r"(\.\.\.|[\d.,]+\d|\d)( ?[fpnumkM]?(?=[Js]\b))?", "N", line.strip())


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

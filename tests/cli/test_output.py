"""How commands print: within a terminal's width, whole into a pipe, and as JSON."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

import lnpu_torch as lnpu
from helpers.command import lnpu_command
from helpers.handmade import network


def at_a_terminal(width: int, *arguments: str) -> list[str]:
    """The lines that the command prints at a terminal of this width."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "lnpu_torch", *arguments]
    read = b""
    with subprocess.Popen(command, stdin=follower, stdout=follower, env=environment) as started:
        os.close(follower)
        with contextlib.suppress(OSError):  # Linux's end of file, once the command has ended
            while chunk := os.read(leader, 65536):
                read += chunk
    os.close(leader)
    assert started.returncode == 0
    return re.sub(r"\x1b\[[\d;]*m|\r", "", read.decode()).split("\n")


def test_a_table_is_as_wide_as_the_terminal_and_whole_in_a_pipe() -> None:
    narrow, wide = at_a_terminal(80, "chips"), at_a_terminal(200, "chips")
    piped = lnpu_command("chips").stdout.splitlines()
    assert max(map(len, narrow)) <= 80 < max(map(len, wide))
    assert [line.split() for line in piped if line.strip()] == [line.split() for line in wide if line.strip()]
    words = {word for line in piped for word in line.split() if "---" not in word}
    assert words <= {word for line in narrow for word in line.split()}


def printed(*arguments: str) -> Any:
    done = lnpu_command(*arguments)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_chips_as_json() -> None:
    several, one = printed("chips", "--json"), printed("chips", "lnpu", "--json")
    assert one in several and len(several) > 20
    assert one["values"]["sram_bytes"]["value"] == lnpu.chip("lnpu").sram_bytes.value
    assert set(one["values"]) == set(lnpu.chip("lnpu").values())
    assert one["checks"]["peak"]["ours"] == pytest.approx(25.28, abs=0.01)


def test_normalized_figures_as_json() -> None:
    rows = {(row["chip"], row["name"]): row for row in printed("normalize", "--node", "65", "--json")}
    assert rows["lnpu", "peak"]["result"] == 25.3 and rows["lnpu", "peak"]["check"]["of"] == "efficiency"
    assert rows["h100", "fp8"]["result"] is None and "outside" in rows["h100", "fp8"]["lacks"]


def test_recipes_as_json() -> None:
    assert printed("recipes", "--json")["digits_resnet18"]["data"]["kind"] == "digits"


def test_prices_and_sweeps_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network().save("counts.json")
    assert printed("price", "counts.json", "--json") == printed("price", "counts.json", "--format", "json")
    points = printed("sweep", "counts.json", "--set", "macs_per_cycle.fp16=384,768", "--no-plot", "--json")
    assert [point["values"] for point in points] == [{"macs_per_cycle.fp16": 384}, {"macs_per_cycle.fp16": 768}]
    swept = lnpu.sweep(network(), ["lnpu"], {"macs_per_cycle.fp16": [384, 768]})
    assert [point["energy_pj"] for point in points] == [point.energy_pj for point in swept.points]
    Path("paper.yaml").write_text("layers: {fc: {kind: Linear, in_channels: 8, out_channels: 4}}\n")
    told = [printed("estimate", "paper.yaml", *form)["total"] for form in (("--json",), ("--format", "json"))]
    assert told[0] == told[1] and told[0]["macs"] > 0


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("lnpu pr", ["price", "profile"]),
        ("lnpu chips ln", ["lnpu", "lnpu-fp16"]),
        ("lnpu price counts.json --chip dense", ["dense-fp16"]),
        ("lnpu train digits", ["digits_resnet18"]),
    ],
)
def test_a_shell_completes_commands_chips_and_recipes(typed: str, names: list[str]) -> None:
    asked = {"_LNPU_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    code = "import sys, lnpu_torch.cli.app as cli; sys.argv = ['lnpu']; cli.main()"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stdout.split() == names

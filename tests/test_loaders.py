"""Damaged files against every loader: a few at random, and each kind that was ever taken badly."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import fuzz
from helpers.loading import load, nothing_happens
from lnpu_torch import ConfigError, chip
from lnpu_torch.files import LONGEST_YAML, find, parse_json, parse_yaml, validate
from lnpu_torch.quant.precision import Precision, precision


@pytest.mark.parametrize("name", fuzz.LOADERS)
def test_any_file_is_read_or_refused(name: str, tmp_path: Path) -> None:
    fuzz.fuzz(name, tmp_path, examples=30)


def test_the_watch_sees_what_a_loader_must_not_do(tmp_path: Path) -> None:
    for forbidden in (lambda path: path.write_text("x"), lambda path: path.unlink(), lambda path: 1 // 0):
        with pytest.raises((AssertionError, ZeroDivisionError)):
            load(forbidden, tmp_path / "file", b"")


LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 100))])
BAD_YAML = {
    "a value that stands for billions": (LAUGHS, "an alias .* is not read"),
    "a list in itself": ("a: &a [*a]", "an alias .* is not read"),
    "a merge": ("a: {b: 1}\n<<: *a", "an alias .* is not read"),
    "a program": ("!!python/object/apply:os.system [touch here]", "a tag .* is not read"),
    "a tag that PyYAML trips over": ("!!timestamp x", "a tag .* is not read"),
    "a key twice": ("a: 1\nb: {c: 2, c: 3}", "'c' stands twice"),
    "a key that is a list": ("? [a]\n: 1", "unhashable key"),
    "an integer of no digits": ("0b_", "invalid literal"),
    "a sexagesimal beyond all floats": ("1" + ":59" * 500 + ".0", "too large"),
    "lists in lists": ("[" * 150, "more than 100 lists"),
    "lists in lists that end": ("[" * 100_000 + "]" * 100_000, "(more than 100 lists|maximum nesting depth)"),
    "too long": ("#" * (LONGEST_YAML + 1), "at most 262144 are read"),
}


@pytest.mark.parametrize(("text", "said"), BAD_YAML.values(), ids=BAD_YAML.keys())
def test_yaml_that_is_refused(text: str, said: str) -> None:
    with nothing_happens(), pytest.raises(ConfigError, match=f"(?s)here: .*{said}"):
        parse_yaml(text, "here")


def test_yaml_has_no_dates_and_no_merges() -> None:
    assert parse_yaml("2020-01-01: 2020-99-99\n<<: =", "here") == {"2020-01-01": "2020-99-99", "<<": "="}
    assert parse_yaml("[2.0e8, 1e5, .5E-1, -1.e+2, yes, ~, 0x1f]", "here") == [2e8, 1e5, 0.05, -100.0, True, None, 31]


def test_long_yaml_takes_no_longer_than_its_length() -> None:
    with nothing_happens():
        assert len(parse_yaml("\n".join(f"k{i}: 1" for i in range(3_000)), "here")) == 3_000
        with pytest.raises(ConfigError, match="digits"):
            parse_yaml("1" * 200_000, "here")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": 1, "a": 2}', "9" * 5000, '{"a": NaN', "\ud800"])
def test_json_that_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="here: not valid JSON"):
        parse_json(text, "here")


def test_what_json_could_not_hold_is_refused() -> None:
    deep: list[object] = []
    for _ in range(20_000):
        deep = [deep]
    for data in ({"chunk": int("f" * 5000, 16)}, {"chunk": deep}, {"chunk": "\ud800"}, {1.5: 2}):
        with pytest.raises(ConfigError, match="here: "):
            validate(Precision, data, "here")


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "", ".", "/", "\ud800"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown precision"):
        precision(name)
    with pytest.raises(ConfigError, match="unknown chip"):
        find("chips", name, "chip")
    (tmp_path / "chip.yaml").write_text(json.dumps({"like": name, "description": "d"}))
    with pytest.raises(ConfigError, match=r"unknown chip|not valid YAML"):
        chip(tmp_path / "chip.yaml")


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    """It would be waited for, for ever."""
    os.mkfifo(tmp_path / "pipe")
    with nothing_happens(), pytest.raises(ConfigError):
        chip(tmp_path / "pipe")

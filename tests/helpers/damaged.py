"""Files as they must not be: texts damaged byte by byte, and data with something else in some place. For hypothesis."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import yaml
from hypothesis import strategies as st

NASTY = (
    *(b"&a ", b"*a", b"<<: *a\n", b"<<: {a: 1}\n", b"!!python/object/apply:os.system [exit]", b"!!timestamp x"),
    *(b"!!int ''", b"!!bool x", b"!!float x", b"!!binary x", b"!!set {a, b}", b"!!omap [a]", b"!!null x", b"!x y"),
    *(b"2020-01-01: 1\n", b"2020-99-99", b"? [a]\n: b\n", b"? {a: b}\n: c\n", b"null: 1\n", b"~", b".nan", b"-.inf"),
    *(b"0x" + b"f" * 5000, b"9" * 5000, b"1" * 400, b"1e999", b"-1", b"NaN", b"Infinity", b"1:60:60", b"0b", b"1_0"),
    *(
        b"[" * 300,
        b"{a: " * 300,
        b"- " * 300,
        b"[[]" * 3000,
        b'{"a":' * 1200,
        b"#",
        b"\t",
        b"\x00",
        b"\xff\xfe",
        b"\xc3",
    ),
    *(b'"\\ud800"', b"\xe2\x80\xa8", b"---\n", b"...\n", b"%YAML 9.9\n", b"|\n", b">-\n", b'"', b"'", b"{", b"}", b"["),
    *(
        b"]",
        b":",
        b",",
        b": ",
        b"- ",
        b"\n",
        b"\r",
        b" ",
        b"true",
        b"null",
        b"value: 1\n",
        b"like: lnpu\n",
        b"like: file\n",
    ),
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 2**31, 2**63, 2**64, 10**400, -(10**30)]),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        ["", "lnpu", "../../etc/passwd", "/dev/zero", "x" * 300, "a\0b", "\ud800", "$x^$", "<script>", "[red]"]
    ),
)
data = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=8) | st.sampled_from(["value", "like", "name", "steps", "version"]), inner),
    ),
    max_leaves=12,
)


@st.composite
def changed_bytes(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """One of these files after some edits anywhere: taken out, doubled, put in, cut off."""
    text = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(0, 3))):
        start, length = draw(st.integers(0, len(text))), draw(st.sampled_from([0, 1, 2, 8, 40, 200]))
        here = text[start : start + length]
        there = draw(
            st.sampled_from([b"", here * 2, here * 50, text[: len(text) // 2], *NASTY]) | st.binary(max_size=4)
        )
        text = text[:start] + there + (text[start + length :] if draw(st.integers(0, 7)) else b"")
    return text


@st.composite
def changed_data(draw: st.DrawFn, seeds: tuple[Any, ...], write: Callable[[Any], bytes]) -> bytes:
    """One of these files with something else in some place, or a key too many or too few."""
    found = {"": copy.deepcopy(draw(st.sampled_from(seeds)))}
    for _ in range(draw(st.integers(1, 2))):
        place, key = _anywhere(draw, found, "")
        how = draw(st.sampled_from(["replace", "replace", "wrap", "drop", "add"]))
        if how == "drop" and isinstance(place, dict) and place is not found:
            del place[key]
        elif how == "add" and isinstance(place[key], dict):
            place[key][draw(st.text(max_size=8))] = draw(data)
        else:
            place[key] = [place[key]] if how == "wrap" else draw(data)
    return write(found[""])


def _anywhere(draw: st.DrawFn, place: Any, key: Any) -> tuple[Any, Any]:
    """A mapping or list within `place[key]`, and a key in it."""
    here = place[key]
    keys = list(here) if isinstance(here, dict) else list(range(len(here))) if isinstance(here, list) else []
    if not keys or not draw(st.integers(0, 5)):
        return place, key
    return _anywhere(draw, here, draw(st.sampled_from(keys)))


def as_yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, sort_keys=False).encode("utf-8", "surrogatepass")


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def yaml_files(*seeds: Any) -> st.SearchStrategy[bytes]:
    """Damaged YAML files of these data."""
    return st.one_of(changed_bytes(tuple(map(as_yaml, seeds))), changed_data(seeds, as_yaml), data.map(as_yaml))


def json_files(*seeds: Any) -> st.SearchStrategy[bytes]:
    """Damaged JSON files of these data."""
    return st.one_of(changed_bytes(tuple(map(as_json, seeds))), changed_data(seeds, as_json), data.map(as_json))


def text_files(*seeds: str) -> st.SearchStrategy[bytes]:
    """Damaged text."""
    return changed_bytes(tuple(seed.encode() for seed in seeds))

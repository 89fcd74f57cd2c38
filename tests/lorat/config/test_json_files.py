"""Whatever a JSON file holds, it is used or refused in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from lorat.config.bounds import Bounds
from lorat.config.json_files import parse_json, read_json, write_json
from lorat.errors import UserError


@dataclass(frozen=True)
class Place:
    row: int
    name: str | None = None
    sides: tuple[float, ...] = ()


@pytest.mark.parametrize(
    ("text", "shape", "message"),
    [
        (b"{", dict, "not JSON"),
        (b"", dict, "not JSON"),
        (b"null", dict, "it is null, not an object"),
        (b'{"a": 1}', {"b": int}, "b is missing"),
        (b'{"a": {"b": "1"}}', {"a": {"b": int}}, 'a.b is "1", not a whole number'),
        (b'{"a": [1, 2, null]}', {"a": [int]}, r"a\[2\] is null, not a whole number"),
        (b'{"a": true}', {"a": int}, "a is true, not a whole number"),
        (b'{"a": -1}', {"a": Annotated[int, Bounds(0, 9)]}, "a is -1, not 0 to 9"),
        (b'{"a": NaN}', dict, "NaN, which is not finite"),
        (b'{"a": 1e999}', dict, "1e999, which is not finite"),
        (b'{"a": 1' + b"0" * 5000 + b"}", dict, "a number of 5001 digits"),
        (b'{"a": 1, "a": 2}', dict, '"a" twice'),
        (b"\xff\xfe{\x00}\x00", dict, "not UTF-8"),
        (b'{"a": "\\ud800"}', dict, "not UTF-8"),
        (b"[" * 100_000, dict, "nested too deep"),
        (b'{"a":' * 300 + b"1" + b"}" * 300, dict, "nested more than 64 deep"),
        (b'{"row": 1, "size": 2}', Place, "size is not known"),
        (b'{"name": "a"}', Place, "row is missing"),
        (b'{"row": 1, "sides": ["a"]}', Place, "sides is .*, not a list, each a number"),
    ],
    ids=range(19),
)
def test_what_is_wrong_is_said_with_the_place_and_what_to_do(
    text: bytes, shape: Any, message: str
) -> None:
    with pytest.raises(
        UserError, match=rf"^run\.json cannot be used: .*{message}.*; start anew\.$"
    ):
        parse_json(text, "run.json", "start anew", shape=shape)


def test_what_fits_is_returned() -> None:
    text = '{"row": 3, "sides": [1, 2.5]}'
    assert parse_json(text, "a", "b", shape=Place) == {"row": 3, "sides": [1, 2.5]}
    assert parse_json("[Infinity]", "a", "b", shape=[float], finite=False) == [float("inf")]
    assert parse_json('{"a": 1}', "a", "b", shape={"a": int, "b?": str}) == {"a": 1}


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    write_json({"a": 1}, tmp_path / "sub" / "a.json")
    assert read_json(tmp_path / "sub" / "a.json", "start anew") == {"a": 1}
    with pytest.raises(UserError, match=r"There is no .*b\.json; start anew\."):
        read_json(tmp_path / "b.json", "start anew")
    with pytest.raises(UserError, match=r"sub cannot be read: Is a directory; start anew\."):
        read_json(tmp_path / "sub", "start anew")

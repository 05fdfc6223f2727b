"""Results as files: what is read back, and what is refused with a reason."""

import json
import os
from dataclasses import dataclass

import pytest

from diffusers_dino.evaluation.results import JsonResult


@dataclass(frozen=True)
class Part:
    value: float
    name: str | None


@dataclass(frozen=True)
class Result(JsonResult):
    count: int
    parts: tuple[Part, ...]
    best: Part | None
    added_later: bool = True


WHOLE = {"count": 2, "parts": [{"value": 1, "name": "a"}, {"value": float("nan"), "name": None}], "best": None}


def load(tmp_path, text: str | bytes) -> Result:
    (tmp_path / "result.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return Result.load(tmp_path / "result.json")


def test_results_of_older_and_newer_versions_are_read(tmp_path):
    result = load(tmp_path, json.dumps(WHOLE | {"of_a_newer_version": 1}))
    assert (result.parts[0], result.best, result.added_later) == (Part(1, "a"), None, True)
    result.save(tmp_path / "again.json")
    assert repr(Result.load(tmp_path / "again.json")) == repr(result)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"count": None}, "count is a NoneType, not a int"),
        ({"count": "2"}, "count is a str, not a int"),
        ({"count": True}, "count is a bool, not a int"),
        ({"parts": {"0": 1}}, "parts is a dict, not a list"),
        ({"parts": "ab"}, "parts is a str, not a list"),
        ({"parts": [{"value": "1", "name": None}]}, r"parts\[0\].value is a str, not a int or float"),
        ({"parts": [{"value": 1}]}, r"parts\[0\] lacks name"),
        ({"best": [1]}, "best is a list, not a dict"),
        ({"added_later": 1}, "added_later is a int, not a bool"),
    ],
)
def test_the_place_of_what_is_wrong_is_named(changed, message, tmp_path):
    with pytest.raises(ValueError, match=rf"result.json is not a Result, or is damaged: {message}"):
        load(tmp_path, json.dumps(WHOLE | changed))


@pytest.mark.parametrize(
    "text", ["[]", "null", "3", '"rows"', "{}", "", "{", '{"a": ', "[" * 100_000, b"\xff\xfe\x00", b"\x00" * 9]
)
def test_what_is_no_result_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match=r"result\.json is (not a|damaged)"):
        load(tmp_path, text)


def test_pipes_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "result.json")
    with pytest.raises(ValueError, match="is a pipe"):
        Result.load(tmp_path / "result.json")

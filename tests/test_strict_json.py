from dataclasses import dataclass
from typing import Any, Literal

import pytest

from rtpurbo import strict_json
from rtpurbo.errors import RTPurboError
from rtpurbo.validation import check_fields


@dataclass
class Settings:
    count: int = 1
    share: float = 0.5
    name: str | None = None
    kind: Literal["a", "b"] = "a"
    on: bool = True
    more: dict[str, Any] | None = None
    other: tuple[int, ...] = ()


def test_valid_json_is_parsed():
    assert strict_json.parse('{"a": [1, {"a": null}], "b": "é"}') == {
        "a": [1, {"a": None}],
        "b": "é",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "names 'c' twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("9" * 5000, "4300 digits"),
        ("{", "Expecting"),
    ],
)
def test_invalid_json_is_a_value_error(text, message):
    with pytest.raises(ValueError, match=message):
        strict_json.parse(text)


def test_a_file_must_be_utf8(tmp_path):
    path = tmp_path / "file.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="utf-8"):
        strict_json.read(path)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"count": -3, "share": 2, "name": "x", "kind": "b", "on": False, "more": {}},
        {"name": None, "more": None, "other": "not looked at"},
    ],
)
def test_values_of_the_fields_types_pass(values):
    check_fields(Settings, values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"count": 1.0}, "count is 1.0, but it must be a whole number"),
        ({"count": True}, "count is true, but it must be a whole number"),
        ({"share": "1"}, "share is '1', but it must be a number"),
        ({"share": float("nan")}, "share is nan"),
        ({"share": float("inf")}, "share is inf"),
        ({"share": None}, "share is null"),
        ({"name": 5}, "name is 5, but it must be a string or null"),
        ({"kind": "c"}, "kind is 'c', but it must be one of: a, b"),
        ({"kind": ["a"]}, "kind is"),
        ({"on": 1}, "on is 1, but it must be true or false"),
        ({"more": []}, "more is .*, but it must be an object or null"),
        ({"name": ["x" * 100]}, "name is .{60}\\.\\.\\., but"),
    ],
)
def test_unknown_keys_are_named(values, message):
    with pytest.raises(RTPurboError, match=message):
        check_fields(Settings, values)

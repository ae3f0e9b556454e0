"""Strict parsing of untrusted JSON, and type checks against a dataclass."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rtpurbo.errors import RTPurboError


def parse(text: str) -> Any:
    """Parses JSON more strictly than Python's parser.

    Raises:
        ValueError: the text is not JSON, has a duplicate key or is nested too deeply.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read(path: Path) -> Any:
    """Parses a UTF-8 file as `parse` does.

    Raises:
        ValueError: as `parse`, or the file is not UTF-8.
        OSError: the file cannot be read.
    """
    return parse(path.read_text(encoding="utf-8"))


def check_fields(kind: type, data: Mapping[str, Any]) -> None:
    """Checks the arguments of a dataclass.

    Args:
        kind: dataclass; fields of other types than int, float, str, bool, dict, Literal and their unions with
            None are not checked.
        data: arguments by name.

    Raises:
        RTPurboError: a value is of another type, or a number is not finite.
    """
    hints = _hints(kind)
    for field in fields(kind):
        if field.name in data and not _fits(data[field.name], hints[field.name]):
            raise RTPurboError(
                f"{field.name} is {_shown(data[field.name])}, but it must be "
                f"{_in_words(hints[field.name])}."
            )


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _fits(value: Any, hint: Any) -> bool:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, each) for each in get_args(hint))
    if origin is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if origin is dict or hint is dict:
        return isinstance(value, dict)
    if hint is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return hint not in (str, bool, type(None)) or isinstance(value, hint)


def _in_words(hint: Any) -> str:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(each) for each in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    words = {
        float: "a finite number",
        int: "a whole number",
        str: "a string",
        bool: "true or false",
    }
    return "null" if hint is type(None) else words.get(hint, "an object")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names '{twice}' twice")
    return found

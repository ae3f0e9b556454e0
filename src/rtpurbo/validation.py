"""Checks of setting values: choices, lower bounds, and types by the annotations of their dataclasses."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rtpurbo.errors import RTPurboError

_WRONG = object()
"""Marker of a value that is not of the expected type; None can be a valid value."""

_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
}


def check_choice(name: str, value: str, allowed: Any) -> None:
    """Refuses a value that a Literal type does not contain."""
    if value not in get_args(allowed):
        raise RTPurboError(
            f"{name} is '{value}', but it must be one of: {', '.join(get_args(allowed))}."
        )


def check_at_least(least: int, settings: Any, *names: str) -> None:
    """Refuses fields below a bound; None is allowed."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise RTPurboError(f"{name} is {value}, but it must be at least {least}.")


def field_types(kind: type) -> dict[str, Any]:
    """Returns the resolved type of each field of a dataclass, by field name."""
    return get_type_hints(kind)


def check_fields(kind: type, data: Mapping[str, Any]) -> None:
    """Checks arguments of a dataclass that were read from JSON; unlike settings, they are not converted.

    Args:
        kind: dataclass; fields of other types than int, float, str, bool, dict, Literal and their unions with
            None are not checked.
        data: arguments by name.

    Raises:
        RTPurboError: a value is of another type, or a number is not finite.
    """
    for name, expected in field_types(kind).items():
        if name in data and _is_plain(expected):
            converted = _converted(data[name], expected)
            if converted is _WRONG or (type(data[name]) is float and type(converted) is int):
                raise _wrong_type(name, data[name], expected)


def _is_plain(expected: Any) -> bool:
    if get_origin(expected) in (Union, types.UnionType):
        return all(map(_is_plain, get_args(expected)))
    return get_origin(expected) in (Literal, dict) or expected in (*_EXPECTED, type(None))


def checked_value(name: str, value: Any, expected: Any) -> Any:
    """Returns a value as the type of its setting.

    A whole float becomes an int, an int a float, a list a tuple, and a single value a tuple of one.

    Args:
        name: dotted name of the setting, for the message.
        value: of JSON's types, or of the setting's own.
        expected: type of the setting: bool, int, float, str, a Literal, a tuple of any length, a
            mapping of names to values, a dataclass, or one of these or None.

    Raises:
        RTPurboError: the value is of another type.
    """
    converted = _converted(value, expected)
    if converted is _WRONG:
        raise _wrong_type(name, value, expected)
    return converted


def _wrong_type(name: str, value: Any, expected: Any) -> RTPurboError:
    shown = _shown(value)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return RTPurboError(f"{name} is {shown}, but it must be {_description(expected)}.")


def _converted(value: Any, expected: Any) -> Any:
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        candidates = (_converted(value, argument) for argument in arguments)
        return next((found for found in candidates if found is not _WRONG), _WRONG)
    if origin is Literal:
        return value if isinstance(value, str) and value in arguments else _WRONG
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        converted = [_converted(item, arguments[0]) for item in items]
        return _WRONG if any(item is _WRONG for item in converted) else tuple(converted)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            return _WRONG
        entries = {key: _converted(item, arguments[1]) for key, item in value.items()}
        return _WRONG if any(item is _WRONG for item in entries.values()) else entries
    if origin is dict or expected is type(None):
        return value if isinstance(value, origin or expected) else _WRONG
    if expected in (int, float):
        return _number(value, expected)
    return value if isinstance(value, expected) else _WRONG


def _number(value: Any, expected: type) -> Any:
    # A bool is an int to Python, but `steps=true` is a mistake.
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _WRONG
    if not math.isfinite(value) or (expected is int and value != int(value)):
        return _WRONG
    return expected(value)


def _description(expected: Any) -> str:
    origin, arguments = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        return " or ".join(_description(argument) for argument in arguments)
    if origin is Literal:
        return f"one of: {', '.join(arguments)}"
    if origin is tuple:
        return "a list of whole numbers, such as [4096,8192]"
    if origin is Mapping:
        return 'an object of numbers by name, such as {"needles": 0.5}'
    if origin is dict:
        return "an object"
    if expected is type(None):
        return "null"
    if is_dataclass(expected) and isinstance(expected, type):
        return f"{expected.__name__}; name one of its settings instead"
    return _EXPECTED[expected]


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_shown(item)}' for name, item in value.items())}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_shown, value))}]"
    return repr(value)

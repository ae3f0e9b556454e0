"""Strict parsing of untrusted JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


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


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names '{twice}' twice")
    return found

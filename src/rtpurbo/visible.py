"""Escaping of control characters in untrusted text."""

from __future__ import annotations

import re

# C0 without tab and line feed, DEL, C1, which can control the terminal, and marks that reorder text.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    r"""Returns text with escaped control characters, such as `\x1b` for the escape character."""
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)

"""HTML and SVG as escaped text."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable

_VOID = {"meta", "link", "br", "hr"}


class Markup(str):
    """Text that is HTML or SVG already; any other text is escaped where it is put into it."""

    __slots__ = ()


Content = str | Markup | None


def tag(
    name: str, /, *children: Content | Iterable[Content], **attributes: str | float | None
) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: text, elements, or lists of them.
        attributes: None leaves one out; `class_` is `class`, and `view_box` or `aria_label` get the
            names that SVG and HTML know.
    """
    written = "".join(
        f' {_attribute_name(key)}="{html.escape(_text(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: Content | Iterable[Content]) -> Markup:
    """Children one after the other, escaped unless they are markup."""
    parts = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            parts.append(str(child))
        elif isinstance(child, str):
            parts.append(html.escape(child, quote=False))
        else:
            parts.append(str(join(*child)))
    return Markup("".join(parts))


def number(value: float) -> str:
    """A coordinate: a tenth of a unit is finer than a screen."""
    if not math.isfinite(value):
        raise ValueError(f"{value} is no coordinate")
    written = f"{value:.1f}".removesuffix(".0")
    return "0" if written == "-0" else written


def _attribute_name(name: str) -> str:
    name = name.removesuffix("_")
    return "viewBox" if name == "view_box" else name.replace("_", "-")


def _text(value: str | float) -> str:
    return value if isinstance(value, str) else number(value)

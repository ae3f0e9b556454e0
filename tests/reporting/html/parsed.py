"""A page, taken apart."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr"}


class Page(HTMLParser):
    """Its elements with their attributes, its style and its text; refuses tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        assert not self._open

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open:
            self.texts.append((self._open[-1], data))

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        """Those of every element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def of_class(self, name: str) -> list[dict[str, str | None]]:
        """Attributes of every element of a class."""
        return [each for _, each in self.elements if name in (each.get("class") or "").split()]

    def text(self, *tags: str) -> str:
        """The text within some kinds of elements, or all that is shown."""
        shown = (
            data
            for tag, data in self.texts
            if (tag in tags if tags else tag not in ("style", "script"))
        )
        return " ".join("".join(f"{data} " for data in shown).split())

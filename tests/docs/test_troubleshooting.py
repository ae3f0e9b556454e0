"""The error messages on the page of troubleshooting are messages of the code."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "how-to" / "troubleshooting.md"


@cache
def texts():
    """All texts in the source; values that are put into them are an ellipsis."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    one.value if isinstance(one, ast.Constant) else "..." for one in node.values
                )
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def messages():
    rows = re.findall(r"^\| (`.+?`) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [row.strip("`") for row in rows]


@pytest.mark.parametrize("message", messages())
def test_messages_of_the_page_are_in_the_code(message):
    pieces = [re.escape(piece) for piece in message.split("...")]
    pattern = re.compile(".*".join(pieces), re.DOTALL)
    assert any(pattern.search(text) for text in texts())


def test_the_page_lists_messages():
    assert len(messages()) > 20

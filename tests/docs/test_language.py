"""Words that the glossary retires occur nowhere, and docstring summaries name what a thing is or does."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GLOSSARY = ROOT / "docs" / "glossary.md"
# A log keeps its entries as they were written, and the glossary lists the words themselves.
LEFT_ALONE = {GLOSSARY, ROOT / "docs" / "experiment-log.md", ROOT / "docs" / "changelog.md"}
# Its words are data: training sequences are drawn from them.
WORD_LIST = ROOT / "src" / "rtpurbo" / "data" / "words.py"
QUESTION_WORD = re.compile(r"(What|Who|Whom|Whose|Which|How|Whether)\b")


def retired_words():
    """The rows of the glossary's second table: a pattern and what replaces it."""
    section = GLOSSARY.read_text(encoding="utf-8").partition("## Retired words")[2]
    rows = re.findall(r"^\| `(.+?)` \| (.+?) \|$", section, re.MULTILINE)
    # In a table, a vertical bar is escaped.
    return [(pattern.replace(r"\|", "|"), term) for pattern, term in rows]


def pages():
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for folder in ("recipes", "artifacts"):
        found += sorted((ROOT / folder).glob("*/README.md"))
    return [path for path in found if path not in LEFT_ALONE]


def sources(*folders):
    return sorted({path for name in folders for path in (ROOT / name).rglob("*.py")} - {WORD_LIST})


def occurrences(paths):
    patterns = [(re.compile(pattern), term) for pattern, term in retired_words()]
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            for pattern, term in patterns:
                if match := pattern.search(line):
                    place = path.relative_to(ROOT)
                    yield f"{place}:{number}: '{match[0]}', now: {term}"


def summaries(path):
    """The first line of every docstring of a module, with its line number."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            yield getattr(node, "lineno", 1), text.splitlines()[0]


def test_the_glossary_lists_retired_words_as_patterns():
    words = retired_words()
    assert len(words) > 30
    for pattern, term in words:
        re.compile(pattern)
        assert term


@pytest.mark.parametrize("path", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_use_no_retired_words(path):
    assert not list(occurrences([path]))


def test_the_source_uses_no_retired_words():
    assert not list(occurrences(sources("src", "experiments", "recipes", "docs")))


def test_docstring_summaries_do_not_open_with_a_question_word():
    wrong = [
        f"{path.relative_to(ROOT)}:{number}: {summary}"
        for path in sources("src", "experiments", "recipes", "docs", "tests")
        for number, summary in summaries(path)
        if QUESTION_WORD.match(summary)
    ]
    assert not wrong

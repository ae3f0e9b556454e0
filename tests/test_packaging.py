"""Imports of the package against the dependencies that it declares."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Installed by torch on Linux, by vLLM where its plugin runs, and for type checkers.
BY_OTHERS = {"triton", "vllm", "prometheus_client", "typing_extensions"}


def declared():
    """Import names of the dependencies and of all extras."""
    tomllib = pytest.importorskip("tomllib")  # new in Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (line for lines in project["optional-dependencies"].values() for line in lines)
    core, every = (
        {re.match(r"[\w-]+", line)[0].replace("-", "_") for line in lines}
        for lines in (project["dependencies"], [*project["dependencies"], *extras])
    )
    return core, every


def imported():
    """Packages from outside the standard library that the source imports, wherever in a module."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"rtpurbo"}


def test_every_import_is_declared():
    _, every = declared()
    assert imported() - every <= BY_OTHERS


def test_every_dependency_is_imported():
    core, _ = declared()
    assert core <= imported()


def test_the_table_of_dependencies_is_complete():
    core, _ = declared()
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Dependencies")[2]
    rows = re.findall(r"^\| (`.+?) \|", section.partition("\n## ")[0], re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == core

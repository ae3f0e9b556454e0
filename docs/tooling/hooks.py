"""Pages of the site besides the Markdown in docs/: written elsewhere, or generated when it is built."""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from families import families_page  # noqa: E402
from made_pages import (  # noqa: E402
    commands_page,
    report_64k_page,
    report_page,
    report_policies_page,
    results_page,
    table_place,
)

BORROWED = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "experiments.md": "experiments/README.md",
    "how-to/long-context-model.md": "recipes/smollm2-64k/README.md",
}
"""Pages of the site that are files elsewhere in the repository."""

MADE: dict[str, Callable[[], str]] = {
    "families.md": families_page,
    "tables.md": results_page,
    "reference/commands.md": commands_page,
    "example-report.html": report_page,
    "report-64k.html": report_64k_page,
    "report-policies.html": report_policies_page,
}

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
_CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Adds those pages."""
    for page, origin in BORROWED.items():
        content = (ROOT / origin).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=content))
    for page, make in MADE.items():
        files.append(File.generated(config, page, content=make()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Points links, which are written for readers of the repository, to pages of the site.

    Links to files of results lead to their tables; links to other files that the site does not have become their text.
    """
    place = page.file.src_uri
    origin = BORROWED.get(place, f"docs/{place}")
    homes = {home: page for page, home in BORROWED.items()}

    def mended(match: re.Match[str]) -> str:
        image, text, target, anchor = (part or "" for part in match.groups())
        if not target or ":" in target:
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        if path in homes or path.startswith("docs/"):
            here = homes.get(path, path.removeprefix("docs/"))
            link = posixpath.relpath(here, posixpath.dirname(place) or ".")
            return f"{image}[{text}]({link}{anchor})"
        if not (ROOT / path).exists():
            raise PluginError(f"{origin} links to {target}, which does not exist.")
        if path.startswith("benchmarks/results/"):
            link = posixpath.relpath(table_place(ROOT / path), posixpath.dirname(place) or ".")
            return f'[{text}]({link} "{path}")'
        return text

    parts = _CODE.split(markdown)
    return "".join(
        part if number % 2 else _LINK.sub(mended, part) for number, part in enumerate(parts)
    )

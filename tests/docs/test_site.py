"""The site builds, and none of its pages asks another host for anything."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# What a browser fetches by itself, unlike links, which somebody has to follow.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)[^>]+src="?(https?:)?//|<link[^>]+(?:stylesheet|preconnect|icon|preload)[^>]+href="?(https?:)?//|@import|url\(["']?(https?:)?//"""
)


@pytest.mark.slow
def test_the_site_builds_and_fetches_nothing(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed: `make docs` does")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    pages = [*tmp_path.rglob("*.html"), *tmp_path.rglob("*.css")]
    assert len(pages) > 20
    for page in pages:
        assert not FETCHED.search(page.read_text(encoding="utf-8")), page
    for page in (
        "index.html",
        "concepts/index.html",
        "results/index.html",
        "tables/index.html",
        "glossary/index.html",
        "example-report.html",
        "report-64k.html",
        "report-policies.html",
    ):
        assert (tmp_path / page).is_file()

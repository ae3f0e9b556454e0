"""Pages made from results, from the command line's help and from the shipped artifacts.

    python docs/tooling/made_pages.py > results.md

prints the page of tables.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ablation_tables import group_markdown
from typer import Context
from typer.cli import get_docs_for_click
from typer.main import get_command

from rtpurbo.cli import app
from rtpurbo.evaluation.records import read_results
from rtpurbo.reporting.html.page import page
from rtpurbo.reporting.html.sources import read_sources
from rtpurbo.reporting.speed import speed_markdown
from rtpurbo.reporting.tables import markdown_tables
from rtpurbo.speed_records import read_speed

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ARTIFACTS = ROOT / "artifacts"

_ABOUT_RESULTS = """# All tables

Generated from the files in `benchmarks/results/` when this site is built; each table names the command
that made it. [Results](results.md) explains the important ones. The reports show them with plots:
[SmolLM2](example-report.html), and [SmolLM2 at 64K](report-64k.html) with RULER, on which
[every policy](report-policies.html) was compared too. How they were measured: [evaluation](evaluation.md),
[benchmarks](benchmarks.md), [experiment log](experiment-log.md).
"""
_ABOUT_QUALITY = """## Quality: the dense model beside every policy

Accuracy in percent, and perplexity for prose. *Far tokens read* is the share of the tokens outside window and sinks
that retrieval heads read in decode steps. [The policies](evaluation.md#policies).
"""
_ABOUT_SPEED = """## Speed

[How to read these tables](benchmarks.md#how-to-read-it).
"""
_ABOUT_ABLATIONS = """## Ablations

![Accuracy by the number of retrieval heads; tokens to read by the dimensions of the index;
divergence of answers by what their queries read; how much queries read](images/ablations-8k.png)

What they mean, and how they were run: [experiment log](experiment-log.md).
"""


_COMMAND_LIST = re.compile(r"\*\*Commands\*\*:\n\n(?:\* .*\n)+\n?")


def results_page() -> str:
    """Every table of results, in Markdown."""
    kinds: dict[str, list[str]] = {"quality": [], "speed": [], "ablation": []}
    for path in sorted(RESULTS.rglob("*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        kind = _kind(found)
        if kind is not None:
            kinds[kind].append(_TABLES[kind](path, found))
    parts = [_ABOUT_RESULTS]
    for kind, about in zip(kinds, (_ABOUT_QUALITY, _ABOUT_SPEED, _ABOUT_ABLATIONS), strict=True):
        if kinds[kind]:
            parts += [about, *kinds[kind]]
    return "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """The help of every command."""
    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=Context(command), name="rtpurbo", title="Commands")
    # Lists of commands, which cut their first sentences short, are what the page's own menu is.
    return _COMMAND_LIST.sub("", text)


def report_page() -> str:
    """The report of SmolLM2 made sparse, with all that was measured of it and of layers."""
    layers = ("prefill-h100", "decode-h100", "model-decode-h100")
    return _report("smollm2-135m-instruct", "quality-smollm2-135m-instruct", *layers)


def report_64k_page() -> str:
    """The report of SmolLM2 at 64K made sparse, with RULER."""
    return _report("smollm2-64k-sparse", "quality-smollm2-64k-h200")


def report_policies_page() -> str:
    """The report of every policy on that model, asked a part of the same questions."""
    return page(read_sources([RESULTS / "quality-smollm2-64k-controls-h200.json"]))


def _report(artifact: str, *results: str) -> str:
    return page(
        read_sources([ARTIFACTS / artifact, *(RESULTS / f"{name}.json" for name in results)])
    )


def _kind(found: dict[str, Any]) -> str | None:
    """Kind of the records in a results file; None for files that only the experiment log describes."""
    if "group" in found:
        return "ablation"
    record = next(iter(found.get("records", ())), {})
    return "quality" if "suite" in record else "speed" if "phase" in record else None


def anchor(path: Path) -> str:
    """The place of a file's table in the page of tables."""
    return path.stem.replace(".", "-")


def table_place(path: Path) -> str:
    """The link, from the top of the site, to the table of a file of results or to the page of tables."""
    if path.is_dir():
        return "tables.md#ablations"
    shown = path.suffix == ".json" and _kind(json.loads(path.read_text(encoding="utf-8")))
    return f"tables.md#{anchor(path)}" if shown else "tables.md"


def _quality(path: Path, found: dict[str, Any]) -> str:
    results = read_results(path)
    length = results.origin.get("kv_bytes_at")
    tables = markdown_tables(results.records, length, results.averages)
    title = f"### {Path(str(found['model'])).name} {{#{anchor(path)}}}"
    return f"{title}\n\n{_origin(path, found)}\n\n{tables}"


def _speed(path: Path, found: dict[str, Any]) -> str:
    notes = "\n".join(f"- {note}" for note in found["notes"])
    title = f"### {path.stem} {{#{anchor(path)}}}\n\n{_origin(path, found)}"
    is_served = found["records"][0]["phase"] == "serve"
    table = _serve(found["records"]) if is_served else speed_markdown(read_speed(path).records)
    return "\n\n".join(part for part in (title, notes, table) if part)


def _serve(records: list[dict[str, Any]]) -> str:
    """Table of `rtpurbo bench serve`."""
    columns = {
        "engine": lambda record: f"{record['engine']} {record['engine_version']}",
        "policy": lambda record: record["policy"],
        "prompt": lambda record: f"{record['context_length']:,}",
        "requests at a time": lambda record: f"{record['concurrency']}",
        "first token, ms": lambda record: f"{record['time_to_first_token_ms']:,.0f}",
        "per output token, ms": lambda record: f"{record['time_per_output_token_ms']:.2f}",
        "output tokens/s": lambda record: f"{record['output_tokens_per_second']:,.1f}",
        "tokens in the cache": lambda record: f"{record['cache_tokens'] or 0:,}",
    }
    rows = [[cell(record) for cell in columns.values()] for record in records]
    return "\n".join(
        f"| {' | '.join(row)} |" for row in [[*columns], ["---"] * 2 + ["---:"] * 6, *rows]
    )


def _ablation(path: Path, found: dict[str, Any]) -> str:
    return group_markdown(found)


_TABLES = {"quality": _quality, "speed": _speed, "ablation": _ablation}


def _origin(path: Path, found: dict[str, Any]) -> str:
    """Where figures come from, in a line."""
    commit = found.get("commit")
    told = [
        f"`{path.relative_to(RESULTS)}`",
        found["device"],
        f"torch {found['torch']}",
        *([f"commit {commit[:7]}"] if commit else []),
    ]
    return f"{', '.join(told)}; `{found['command']}`"


if __name__ == "__main__":
    print(results_page(), end="")

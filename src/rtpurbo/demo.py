"""Demonstration on a real model: conversion, then comparison with the dense model."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from rtpurbo.conversion import convert
from rtpurbo.devices import default_dtype, device_name, resolve_device
from rtpurbo.evaluation.records import Record, write_results
from rtpurbo.evaluation.run import Case, evaluate
from rtpurbo.files import write_text_atomically
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.models.base import WHEEL_MODEL
from rtpurbo.reporting.figures import has_matplotlib
from rtpurbo.reporting.headmap import head_map_picture
from rtpurbo.reporting.html.page import write_report
from rtpurbo.reporting.model_card import artifact_facts, markdown_rows
from rtpurbo.reporting.tables import markdown_tables, results_tables
from rtpurbo.settings import Progress, no_progress

# Few samples, so that two CPU cores need only minutes.
CASES = (
    Case("needle", "single", 1024, 3),
    Case("needle", "single", 2048, 2),
    Case("needle", "single", 4096, 1),
    Case("needle", "multikey", 2048, 2),
    Case("perplexity", "prose", 2048, 1),
)
POLICIES = ("full", "rtpurbo", "rtpurbo-before-stage2", "local-only", "random-heads")
CACHE_LENGTH = 8192
SHIPPED = Path("artifacts/smollm2-135m-instruct")

_REPORT = """# SmolLM2-135M-Instruct, made sparse on this machine

Converted and measured in {minutes:.0f} minutes on {device}.

{table}

*single*, *multikey*: right answers to questions about numbers hidden in prose, by greedy decoding. *prose*:
perplexity on text that no training saw, with every query sparse. *Far tokens read*: share of the tokens beyond
window and sinks that retrieval heads read where they select. Samples: {samples}. So few show whether something broke,
not small differences; for more, run

    rtpurbo eval {artifact} --samples 20

| policy | what it is |
| --- | --- |
| full | the dense model |
| rtpurbo | the artifact that this demo made |
| rtpurbo-before-stage2 | the same before self-distillation |
| local-only | no retrieval head: window and sinks for every head |
| random-heads | the same number of retrieval heads, chosen at random |
| rtpurbo (shipped) | the artifact in the repository, trained for minutes on a GPU |

## How it was made

{facts}
"""


def run_demo(
    output_dir: str | Path,
    *,
    device: str = "auto",
    seed: int = 0,
    progress: Progress = no_progress,
    console: Console | None = None,
) -> list[Record]:
    """Converts the embedded model, evaluates it with the dense one, and writes a report.

    Args:
        output_dir: receives `artifact/`, `results.json`, `report.md` and, with matplotlib, `report.html`; existing
            files are replaced.
        device: device of the conversion and evaluation.
        seed: seed of all randomness.
        progress: called after each step.
        console: console for the table.

    Returns:
        The records of the table.
    """
    console = console or Console()
    output_dir = Path(output_dir)
    began = time.monotonic()
    place = resolve_device(device)
    artifact = convert(
        WHEEL_MODEL,
        output_dir / "artifact",
        effort="quick",
        changes={"seed": seed},
        device=device,
        force=True,
        progress=progress,
    )
    records = _evaluate(artifact, POLICIES, device, seed, progress)
    if SHIPPED.is_dir():
        shipped = _evaluate(SHIPPED, ("rtpurbo",), device, seed, progress)
        records += [replace(record, policy="rtpurbo (shipped)") for record in shipped]

    described = ArtifactConfig.read(artifact)
    write_results(
        output_dir / "results.json",
        str(artifact),
        device_name(place),
        "rtpurbo demo",
        records,
        {"kv_bytes_at": CACHE_LENGTH, "dtype": str(default_dtype(place)).removeprefix("torch.")},
    )
    samples = ", ".join(f"{cell.task} {cell.context_length}: {cell.samples}" for cell in CASES)
    report = _REPORT.format(
        minutes=(time.monotonic() - began) / 60,
        device=device_name(place),
        table=markdown_tables(records, CACHE_LENGTH),
        samples=samples,
        artifact=artifact,
        facts=markdown_rows(("", ""), artifact_facts(described)),
    )
    write_text_atomically(output_dir / "report.md", report)
    written = output_dir / "report.md"
    if has_matplotlib():
        written = output_dir / "report.html"
        write_report([artifact, output_dir / "results.json"], written)
    console.print(head_map_picture(described.config.head_map))
    console.print(*results_tables(records, CACHE_LENGTH))
    console.print(f"Samples: {samples}. Report: {written}")
    return records


def _evaluate(
    artifact: Path, policies: tuple[str, ...], device: str, seed: int, progress: Progress
) -> list[Record]:
    return evaluate(
        artifact,
        suites=CASES,
        policies=policies,
        seed=seed,
        device=device,
        cache_length=CACHE_LENGTH,
        progress=progress,
    )

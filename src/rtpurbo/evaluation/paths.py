"""Paths of the files of an evaluation, all in the folder of its results file."""

from __future__ import annotations

from pathlib import Path


def samples_path(results: str | Path) -> Path:
    """Returns the path of the samples behind a results file."""
    return _sibling(results, ".samples.jsonl")


def log_path(results: str | Path) -> Path:
    """Returns the path of the log from which a results file is made."""
    return _sibling(results, ".log.jsonl")


def _sibling(results: str | Path, suffix: str) -> Path:
    results = Path(results)
    return results.with_name(results.name.removesuffix(".json") + suffix)

"""Training log in JSON lines, identical for interrupted and uninterrupted runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rtpurbo import strict_json
from rtpurbo.files import explaining_a_full_disk, write_text_atomically
from rtpurbo.training.trackers import Trackers


class TrainingLog:
    """Training log with `stage`, `step` and figures of each step, which also passes them on to trackers.

    Args:
        path: file; None writes none.
        trackers: experiment trackers.
    """

    def __init__(self, path: Path | None, trackers: Trackers | None = None) -> None:
        self.path = path
        self.trackers = trackers or Trackers()

    def write(self, entry: dict[str, Any], **unlogged: float) -> None:
        """Appends a line.

        Args:
            entry: `stage`, `step` and figures.
            unlogged: figures for trackers only, such as speed, which differ from run to run.

        Raises:
            RTPurboError: the disk is full; `entries` skips the incomplete line.
        """
        figures = {name: entry[name] for name in entry if name not in ("stage", "step")}
        self.trackers.log(entry["stage"], entry["step"], {**figures, **unlogged})
        if self.path is not None:
            with (
                explaining_a_full_disk(self.path),
                self.path.open("a", encoding="utf-8") as file,
            ):
                file.write(json.dumps(entry) + "\n")

    def entries(self) -> Iterator[dict[str, Any]]:
        """Yields the entries so far, up to the first line that is incomplete or invalid."""
        if self.path is None or not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = strict_json.parse(line)
            except ValueError:
                return
            if not isinstance(entry, dict) or not {"stage", "step"} <= entry.keys():
                return
            yield entry

    def rewind(self, stage: str, steps: int) -> None:
        """Removes the entries of a stage after its last checkpoint, and those of every later stage."""
        if self.path is None:
            return
        kept, reached = [], False
        for entry in self.entries():
            reached = reached or entry["stage"] == stage
            if reached and (entry["stage"] != stage or entry["step"] > steps):
                break
            kept.append(json.dumps(entry) + "\n")
        write_text_atomically(self.path, "".join(kept))

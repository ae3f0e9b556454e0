"""The training log: one JSON object a line, the same for a run that was interrupted and one that was not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rtpurbo import strict_json
from rtpurbo.files import explaining_a_full_disk, write_text_atomically
from rtpurbo.training.trackers import Trackers


class TrainingLog:
    """Appends entries with `stage`, `step` and figures, and shows them to trackers.

    Args:
        path: the file; None keeps nothing.
        trackers: who else is told.
    """

    def __init__(self, path: Path | None, trackers: Trackers | None = None) -> None:
        self.path = path
        self.trackers = trackers or Trackers()

    def write(self, entry: dict[str, Any], **fleeting: float) -> None:
        """Adds a line.

        Args:
            entry: with `stage`, `step` and figures.
            fleeting: what is only watched, such as speed, in which no two runs agree: for trackers
                alone.

        Raises:
            RTPurboError: the disk is full; what was written of the line is left out by `entries`.
        """
        figures = {name: entry[name] for name in entry if name not in ("stage", "step")}
        self.trackers.log(entry["stage"], entry["step"], {**figures, **fleeting})
        if self.path is not None:
            with (
                explaining_a_full_disk(self.path),
                self.path.open("a", encoding="utf-8") as file,
            ):
                file.write(json.dumps(entry) + "\n")

    def entries(self) -> Iterator[dict[str, Any]]:
        """The lines so far, up to a last one that was cut off, or one that no log has."""
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
        """Forgets what a stage wrote after its last checkpoint, and every later stage."""
        if self.path is None:
            return
        kept, reached = [], False
        for entry in self.entries():
            reached = reached or entry["stage"] == stage
            if reached and (entry["stage"] != stage or entry["step"] > steps):
                break
            kept.append(json.dumps(entry) + "\n")
        write_text_atomically(self.path, "".join(kept))

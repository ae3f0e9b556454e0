"""A file of results that grows while a run goes on, so that one cut short has not been for nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from rtpurbo.evaluation.records import Record, write_results
from rtpurbo.evaluation.ruler.vocabulary import load_vocabulary
from rtpurbo.evaluation.samples import SampleRecord, samples_path, write_samples

SECONDS_BETWEEN = 20.0


class ResultsFile:
    """Collects records and samples, and writes them now and then, and when it is left.

    Args:
        path: the JSON file; samples go to a file beside it. None collects only.
        model: the artifact or model, as `write_results` takes it, like the next three.
        device: what it runs on.
        command: how to get the same results.
        extra: more about the origin.
    """

    def __init__(
        self,
        path: Path | None,
        model: str,
        device: str,
        command: str,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.records: list[Record] = []
        self.samples: list[SampleRecord] = []
        self._origin = (model, device, command)
        self._extra = dict(extra or {})
        self._written = time.monotonic()

    def add_record(self, record: Record) -> None:
        """Adds what was measured."""
        self.records.append(record)
        if time.monotonic() - self._written > SECONDS_BETWEEN:
            self.write()

    def add_sample(self, sample: SampleRecord) -> None:
        """Adds a question with its answer; its record comes after it."""
        self.samples.append(sample)

    def write(self) -> None:
        """Writes what there is."""
        if self.path is None or not self.records:
            return
        extra = self._extra
        if any(record.suite == "ruler" for record in self.records):
            # Words are of a package that may not be installed, and other words make other questions.
            extra = {**extra, "ruler_words": load_vocabulary().name}
        write_results(self.path, *self._origin, self.records, extra)
        if self.samples:
            write_samples(samples_path(self.path), self.samples)
        self._written = time.monotonic()

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.write()

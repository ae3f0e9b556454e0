"""A results file that grows during a run, so that another run can resume it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.averages import Average, averages_of
from rtpurbo.evaluation.cases import HARNESS, Case
from rtpurbo.evaluation.conditions import Conditions
from rtpurbo.evaluation.records import Record, Resumption, read_results, write_results
from rtpurbo.evaluation.ruler.vocabulary import load_vocabulary
from rtpurbo.evaluation.samples import SampleRecord, read_samples, samples_path, write_samples
from rtpurbo.interruption import steps_undisturbed
from rtpurbo.version import library_commit

SECONDS_BETWEEN = 20.0

_SAME_OR_ELSEWHERE = "repeat its command, or name another file with --output."


_Place = tuple[str, str, int, str]
"""A test and who took it: suite, task, context length, policy."""


@dataclass(frozen=True)
class _Taken:
    """Result of a policy in a test."""

    records: list[Record]
    samples: list[SampleRecord]


class ResultsFile:
    """Collects what policies make of tests, and writes it now and then, and when it is left.

    What a policy made of a test is there as a whole or not at all.

    Args:
        path: the JSON file; samples go to a file beside it. None collects only.
        model: the artifact or model, as `write_results` takes it, like the next three.
        device: what it runs on.
        command: how to get the same results.
        extra: more about the origin.
        resume: keep what the file has, if it is there.
    """

    def __init__(
        self,
        path: Path | None = None,
        model: str = "",
        device: str = "",
        command: str = "",
        extra: Mapping[str, Any] | None = None,
        *,
        resume: bool = False,
    ) -> None:
        self.path = path
        self._taken: dict[_Place, _Taken] = {}
        self._model, self._device, self._command = model, device, command
        self._extra = dict(extra or {})
        self._resume = resume
        self._conditions: dict[str, Any] | None = None
        self._tests: dict[str, list[Case]] = {}
        self._written = time.monotonic()
        self._is_changed = False
        self._averages: list[Average] | None = None

    def begin(self, conditions: Conditions) -> None:
        """Tells what decides questions and answers, and takes up what is there to be resumed.

        Raises:
            RTPurboError: the file or that of its samples is broken, or it was measured under other
                conditions or does not tell them.
        """
        self._conditions = conditions.to_dict()
        if self._resume and self.path is not None and self.path.exists():
            self._take_up(self.path, conditions)

    def _take_up(self, path: Path, conditions: Conditions) -> None:
        results = read_results(path)
        before = results.resumption
        if before is None:
            raise RTPurboError(
                f"{path} cannot be resumed, because it does not tell under what conditions it was "
                "measured: name another file with --output."
            )
        if differences := conditions.differences(before.conditions):
            raise RTPurboError(
                f"{path} cannot be resumed, because it was measured with "
                f"{' and with '.join(differences)}: {_SAME_OR_ELSEWHERE}"
            )
        samples = _samples_behind(path, results.records, before.samples)
        for record in results.records:
            self._taken.setdefault(_place(record), _Taken([], [])).records.append(record)
        for sample in samples:
            self._taken[_place(sample)].samples.append(sample)
        self._tests = {name: [Case(*row) for row in rows] for name, rows in before.tests.items()}
        origin = results.origin
        self._device = _joined(origin.get("device"), self._device, ", ")
        self._command = _joined_commands(origin.get("command"), self._command)
        if commit := _joined(origin.get("commit"), library_commit() or "", ", "):
            self._extra["commit"] = commit

    def ask(self, asked: Case) -> None:
        """Tells a case that is asked for.

        Raises:
            RTPurboError: it is there with another number of samples.
        """
        # Only lm-eval's cases may stand for others, which are known once they were prepared.
        own = [] if asked.suite == HARNESS else [asked]
        known = self._tests.get(str(asked), own)
        self.set_tests(asked, [replace(test, samples=asked.samples) for test in known])

    def set_tests(self, asked: Case, tests: Sequence[Case]) -> None:
        """Tells which tests a case stands for.

        Raises:
            RTPurboError: one of them is there with another number of samples.
        """
        there = {str(test): test.samples for known in self._tests.values() for test in known}
        for test in tests:
            samples = there.get(str(test), test.samples)
            if samples != test.samples:
                place = "this run" if self.path is None else self.path
                raise RTPurboError(
                    f"{place} has {samples or 'all'} samples of {test}, not {test.samples or 'all'}: "
                    "ask for as many, or name another file with --output."
                )
        self._tests[str(asked)] = list(tests)

    def tests(self, asked: Case) -> list[Case]:
        """The tests that a case stands for; none while that is not known."""
        return self._tests.get(str(asked), [])

    def every_test(self) -> list[Case]:
        """All tests that are known, of earlier runs too, each once."""
        return list(dict.fromkeys(test for tests in self._tests.values() for test in tests))

    def of(self, test: Case, policy: str) -> list[Record]:
        """Returns the records of a policy in a test, one per metric; none if it has not run."""
        taken = self._taken.get((test.suite, test.task, test.context_length, policy))
        return [] if taken is None else taken.records

    @property
    def records(self) -> list[Record]:
        """All that was measured."""
        return [record for taken in self._taken.values() for record in taken.records]

    @property
    def samples(self) -> list[SampleRecord]:
        """The questions behind it, with their answers."""
        return [sample for taken in self._taken.values() for sample in taken.samples]

    @property
    def averages(self) -> list[Average]:
        """Of the suites that have averages, made of these questions."""
        if self._averages is None:
            self._averages = averages_of(self.samples)
        return self._averages

    def add(self, records: Sequence[Record], samples: Sequence[SampleRecord] = ()) -> None:
        """Adds all that a policy made of a test, in place of what it made of it before."""
        self._taken |= {_place(record): _Taken(list(records), list(samples)) for record in records}
        self._is_changed, self._averages = True, None
        if self.path is not None and time.monotonic() - self._written > SECONDS_BETWEEN:
            # Averages, which take seconds where policies are many, come in the end.
            self._write(self.path, [])

    def write(self) -> None:
        """Writes what there is, if anything is new."""
        if self.path is not None and self._is_changed:
            self._write(self.path, self.averages)
            self._is_changed = False

    def _write(self, path: Path, averages: Sequence[Average]) -> None:
        records, samples, extra = self.records, self.samples, self._extra
        if any(record.suite == "ruler" for record in records):
            # Words are of a package that may not be installed, and other words make other questions.
            extra = {**extra, "ruler_words": load_vocabulary().name}
        resumption = None
        if self._conditions is not None:
            tests = {name: [list(astuple(test)) for test in of] for name, of in self._tests.items()}
            resumption = Resumption(self._conditions, tests, len(samples))
        origin = (self._model, self._device, self._command)
        with steps_undisturbed():
            # First the samples: those that no record speaks of are known to be too many.
            if samples:
                write_samples(samples_path(path), samples)
            write_results(path, *origin, records, extra, averages, resumption)
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


def _place(item: Record | SampleRecord) -> _Place:
    return item.suite, item.task, item.context_length, item.policy


def _samples_behind(path: Path, records: Sequence[Record], count: int) -> list[SampleRecord]:
    """The samples that belong to records, without those of a test that was interrupted."""
    places = {_place(record) for record in records}
    beside = samples_path(path)
    found = read_samples(beside) if count else []
    samples = [sample for sample in found if _place(sample) in places]
    if len(samples) != count:
        raise RTPurboError(
            f"{path} cannot be resumed, because {beside} has {len(samples)} of its samples and not "
            f"{count}: put the file back that was written with it, or name another with --output."
        )
    return samples


def _joined(before: str | None, now: str, between: str) -> str:
    """Both, unless what is now was there before."""
    parts = before.split(between) if before else []
    return between.join([*parts, *([now] if now and now not in parts else [])])


def _joined_commands(before: str | None, now: str) -> str:
    """The commands in turn; one that resumes itself counts once."""
    plain = [word for word in now.split() if word != "--resume"]
    commands = before.split(" && ") if before else []
    known = any(
        [word for word in command.split() if word != "--resume"] == plain for command in commands
    )
    return " && ".join([*commands, *([] if known else [now])])

"""Append-only log of an evaluation's results, and the files made from it.

`NAME.log.jsonl` has a line of JSON for each run (device, command, versions and all else that decides
results), each requested case, and each result of a policy on a case with its samples. `--resume` reads it;
a last line that was cut short is ignored. `NAME.json` and `NAME.samples.jsonl` are made from it at the end of
a run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, replace
from functools import reduce
from pathlib import Path
from typing import Any

from rtpurbo import strict_json
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.averages import Average, averages_of
from rtpurbo.evaluation.cases import HARNESS, Case
from rtpurbo.evaluation.conditions import differences
from rtpurbo.evaluation.paths import log_path, samples_path
from rtpurbo.evaluation.records import (
    CaseResult,
    Record,
    read_results,
    record_of_row,
    write_results,
)
from rtpurbo.evaluation.ruler.vocabulary import load_vocabulary
from rtpurbo.evaluation.samples import SampleRecord, row_of_sample, sample_of_row, write_samples
from rtpurbo.files import append_text
from rtpurbo.interruption import steps_undisturbed
from rtpurbo.version import library_commit

_Place = tuple[str, str, int, str]
"""Suite, task, context length and policy of a result."""

_Line = dict[str, Any]
"""One of `{"run": ...}`, `{"case": ..., "tests": ...}` and `{"records": ..., "samples": ...}`."""


class ResultsLog:
    """Results of an evaluation: each is logged when it is finished, and all are written on exit.

    Args:
        path: the JSON file of `write_results`; the log and the samples are in the same folder. None keeps results
            in memory only.
        model: the artifact or model, as `write_results` takes it, like the next three.
        device: where models run.
        command: the command that gives the same results.
        extra: more about the origin.
        resume: keep the results of earlier runs, if there are any.
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
        self.path, self._model, self._extra = path, model, dict(extra or {})
        self._run: _Line = {"device": device, "command": command, "commit": library_commit()}
        self._resume = resume
        self._runs: list[_Line] = []
        self._results: dict[_Place, CaseResult] = {}
        self._tests: dict[str, list[Case]] = {}
        self._averages: list[Average] | None = None
        self._is_summary_current = True
        # Lines that are logged with the next result, and the bytes of the log's whole lines.
        self._unlogged: list[_Line] = []
        self._log_bytes = 0

    def begin(
        self, conditions: Mapping[str, Any] | None = None, cases: Iterable[Case] = ()
    ) -> None:
        """Begins a run of the requested cases, with the results of earlier runs if it resumes them.

        Conditions decide questions and answers; without them, no later run can resume this one.

        Raises:
            RTPurboError: the log or the files of an earlier run are corrupt, it had other conditions or
                another number of samples of a case.
        """
        if self.path is not None and self._resume and conditions is not None:
            self._read(self.path, conditions)
        self._runs.append({**self._run, "conditions": conditions})
        self._unlogged.append({"run": self._runs[-1]})
        for case in cases:
            # Only cases of lm-eval may stand for others, which are known once they were prepared.
            known = self._tests.get(str(case), [] if case.suite == HARNESS else [case])
            self.set_tests(case, [replace(test, samples=case.samples) for test in known])

    def _read(self, path: Path, conditions: Mapping[str, Any]) -> None:
        log = log_path(path)
        lines, self._log_bytes = _read_log(log)
        if not lines:
            if path.exists():
                raise RTPurboError(
                    f"{path} cannot be resumed, because its log {log} is missing or empty: restore it, "
                    "or name another file with --output."
                )
            return
        try:
            for line in lines:
                self._apply(line)
            before = [run["conditions"] for run in self._runs]
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RTPurboError(f"{log} holds no results or is corrupt; evaluate again.") from error
        if before and before[-1] is None:
            raise RTPurboError(
                f"{path} cannot be resumed, because it does not record under what conditions it was "
                "measured: name another file with --output."
            )
        if before and (found := differences(before[-1], conditions)):
            raise RTPurboError(
                f"{path} cannot be resumed, because it was measured with {' and with '.join(found)}: "
                "repeat its command, or name another file with --output."
            )
        self._is_summary_current = self._has_current_summary(path)

    def _apply(self, line: _Line) -> None:
        """Applies a line of a log to the state."""
        if "run" in line:
            self._runs.append(line["run"])
        elif "case" in line:
            self._tests[line["case"]] = [Case(*row) for row in line["tests"]]
        else:
            records = [record_of_row(row) for row in line["records"]]
            self._keep(CaseResult(records, [sample_of_row(row) for row in line["samples"]]))

    def _keep(self, result: CaseResult) -> None:
        self._results[_place(result.records[0])] = result

    def _has_current_summary(self, path: Path) -> bool:
        """Returns False if the run was killed before it wrote the files made from the log."""
        if not path.exists():
            return False
        written = read_results(path).records
        if not {_place(record) for record in written} <= self._results.keys():
            raise RTPurboError(
                f"{path} cannot be resumed, because it has results that {log_path(path)} lacks: "
                "remove the one that is older."
            )
        return written == self.records and (not self.samples or samples_path(path).exists())

    def set_tests(self, case: Case, tests: Sequence[Case]) -> None:
        """Sets the cases that a requested case stands for.

        Raises:
            RTPurboError: there are results of one of them with another number of samples.
        """
        known = {str(test): test.samples for test in self.every_test()}
        for test in tests:
            samples = known.get(str(test), test.samples)
            if samples != test.samples:
                raise RTPurboError(
                    f"{self.path or 'this run'} has {samples or 'all'} samples of {test}, not "
                    f"{test.samples or 'all'}: ask for as many, or name another file with --output."
                )
        if self._tests.get(str(case)) != list(tests):
            self._tests[str(case)] = list(tests)
            self._unlogged.append({"case": str(case), "tests": list(map(astuple, tests))})

    def tests(self, case: Case) -> list[Case]:
        """Returns the cases that a requested case stands for; none while they are unknown."""
        return self._tests.get(str(case), [])

    def every_test(self) -> list[Case]:
        """Returns all known cases, those of earlier runs included, each once."""
        return list(dict.fromkeys(test for tests in self._tests.values() for test in tests))

    def of(self, test: Case, policy: str) -> list[Record]:
        """Returns the records of a policy on a case, one per metric; none if it has not run."""
        result = self._results.get((test.suite, test.task, test.context_length, policy))
        return [] if result is None else result.records

    @property
    def records(self) -> list[Record]:
        """All records."""
        return [record for result in self._results.values() for record in result.records]

    @property
    def samples(self) -> list[SampleRecord]:
        """All questions with the models' answers."""
        return [sample for result in self._results.values() for sample in result.samples]

    @property
    def averages(self) -> list[Average]:
        """Averages of the suites that have them."""
        if self._averages is None:
            self._averages = averages_of(self.samples)
        return self._averages

    def add(self, result: CaseResult) -> None:
        """Adds the result of a policy on a case, in place of an earlier one, and logs it."""
        self._keep(result)
        self._is_summary_current, self._averages = False, None
        if self.path is None:
            return
        self._unlogged.append(
            {
                "records": [asdict(record) for record in result.records],
                "samples": [row_of_sample(sample) for sample in result.samples],
            }
        )
        lines = "".join(json.dumps(line) + "\n" for line in self._unlogged)
        with steps_undisturbed():
            if not self._resume and not self._log_bytes:
                # This run replaces them, and they have other results than the new log.
                for old in (self.path, samples_path(self.path)):
                    old.unlink(missing_ok=True)
            self._log_bytes = append_text(log_path(self.path), lines, self._log_bytes)
            self._unlogged = []

    def write(self) -> None:
        """Writes the results file and the samples, unless they are current."""
        if self.path is None or self._is_summary_current:
            return
        records, samples = self.records, self.samples
        origin = reduce(_joined, self._runs)
        extra = {**self._extra, "commit": origin["commit"]}
        if any(record.suite == "ruler" for record in records):
            # Words are of a package that may not be installed, and other words make other questions.
            extra["ruler_words"] = load_vocabulary().name
        if (conditions := self._runs[-1]["conditions"]) is not None:
            extra["conditions"] = conditions
        with steps_undisturbed():
            if samples:
                write_samples(samples_path(self.path), samples)
            write_results(
                self.path,
                model=self._model,
                device=origin["device"],
                command=origin["command"],
                records=records,
                extra=extra,
                averages=self.averages,
            )
            self._is_summary_current = True

    def __enter__(self) -> ResultsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self.write()


def _place(item: Record | SampleRecord) -> _Place:
    return item.suite, item.task, item.context_length, item.policy


def _read_log(path: Path) -> tuple[list[_Line], int]:
    """Returns the whole lines of a log, which may not exist, and their bytes."""
    content = path.read_bytes() if path.exists() else b""
    content = content[: content.rfind(b"\n") + 1]
    try:
        return [strict_json.parse(line) for line in content.decode().split("\n")[:-1]], len(content)
    except ValueError as error:
        raise RTPurboError(f"{path} holds no results or is corrupt; evaluate again.") from error


def _joined(before: _Line, now: _Line) -> _Line:
    """Returns the origin of the results of several runs."""
    found: _Line = {}
    for name, between in (("device", ", "), ("commit", ", "), ("command", " && ")):
        parts = before[name].split(between) if before[name] else []
        known = [_without_resume(part) for part in parts]
        if now[name] and _without_resume(now[name]) not in known:
            parts.append(now[name])
        found[name] = between.join(parts) or None
    return found


def _without_resume(command: str) -> list[str]:
    return [word for word in command.split() if word != "--resume"]

"""Cases to run: suites, tasks and lengths, parsed from the names a user gives."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.questions import babilong
from rtpurbo.evaluation.questions.suites import NAMES as QUESTION_SUITES
from rtpurbo.evaluation.questions.suites import ONE_TASK, SHORT
from rtpurbo.evaluation.ruler.tasks import TASKS as RULER_TASKS

HARNESS = "lm-eval"
"""Suite of LM Evaluation Harness, whose tasks are known only to that package."""

NEEDLE_TASKS = {
    "single": {"num_keys": 1, "num_values": 1},
    "multikey": {"num_keys": 4, "num_values": 1},
    "multivalue": {"num_keys": 1, "num_values": 4},
}
"""Numbers of keys and values of each needle task, as arguments of `make_retrieval_example`."""

SUITES: dict[str, tuple[str, ...]] = {
    "needle": tuple(NEEDLE_TASKS),
    "perplexity": ("prose",),
    "ruler": tuple(RULER_TASKS),
    **dict.fromkeys(SHORT, (ONE_TASK,)),
    babilong.SUITE: babilong.TASKS,
    HARNESS: (),
}
"""Tasks of every suite."""

DEFAULT_SAMPLES = 10

DEFAULT_SUITES = ("needle", "perplexity")
DEFAULT_TASKS = {**SUITES, "needle": ("single", "multikey")}
"""Tasks of a suite that is given without any."""


@dataclass(frozen=True)
class Case:
    """One test, the same for every policy.

    Attributes:
        suite: a name of `SUITES`.
        task: of the suite.
        context_length: tokens; 0 is the model's context in the suite `lm-eval`, and the questions' own
            length in suites of short questions.
        samples: number of questions or windows; 0 is all of them, in the suite `lm-eval`.
    """

    suite: str
    task: str
    context_length: int
    samples: int

    def __str__(self) -> str:
        return f"{self.suite} {self.task} {self.context_length}"


def choose_cases(
    suites: Sequence[str | Case],
    lengths: Sequence[int] | Mapping[str, Sequence[int]],
    samples: int | None = None,
    questions: Mapping[str, Mapping[str, int]] | None = None,
) -> list[Case]:
    """Returns the cases that the arguments of `evaluate` select.

    Args:
        suites: as `evaluate` takes them, like the next two.
        lengths: tokens.
        samples: of each case.
        questions: number of questions by suite and task, for suites that read them from files.

    Raises:
        RTPurboError: a suite or task is unknown, a suite has no length, no tasks or no questions,
            or there are no samples.
    """
    if samples is not None and samples < 1:
        raise RTPurboError(f"the number of samples is {samples}, but it must be at least 1.")
    cases: list[Case] = []
    for given in suites:
        if isinstance(given, Case):
            cases.append(given)
            continue
        name, _, own_lengths = given.partition("@")
        suite, _, named = name.partition(":")
        check_name("suite", suite, SUITES)
        if suite in SHORT:
            cases += _question_cases(given, suite, named, own_lengths, samples, questions or {})
            continue
        tasks: Sequence[str] = named.split(",") if named else DEFAULT_TASKS[suite]
        if suite == HARNESS:
            if not all(tasks) or not tasks:
                raise RTPurboError(f"the suite '{suite}' needs tasks, as in {suite}:aime24.")
            suite_lengths = _own_lengths(given, own_lengths, suite, lengths, (0,))
            number = samples or 0
        else:
            for task in tasks:
                check_name(f"{suite} task", task, SUITES[suite])
            default = () if isinstance(lengths, Mapping) else lengths
            suite_lengths = _own_lengths(given, own_lengths, suite, lengths, default)
            number = samples or DEFAULT_SAMPLES
        if not suite_lengths or (min(suite_lengths) < 2 and suite_lengths != (0,)):
            raise RTPurboError(f"the suite '{suite}' needs lengths of at least 2 tokens.")
        if suite == babilong.SUITE:
            counts = _counts(suite, questions or {})
            tasks = tasks if named else list(counts)
            number_of = {task: min(number, counts.get(task, 0)) for task in tasks}
        else:
            number_of = dict.fromkeys(tasks, number)
        cases += [
            Case(suite, task, length, number_of[task]) for task in tasks for length in suite_lengths
        ]
    for case in cases:
        if case.suite in QUESTION_SUITES:
            _check_count(case, _counts(case.suite, questions or {}))
    return list(dict.fromkeys(cases))


def suite_of(given: str | Case) -> str:
    """Returns the name of the suite of an argument of `evaluate`."""
    return given.suite if isinstance(given, Case) else re.split("[:@]", given, maxsplit=1)[0]


def _question_cases(
    given: str,
    suite: str,
    named: str,
    own_lengths: str,
    samples: int | None,
    questions: Mapping[str, Mapping[str, int]],
) -> list[Case]:
    """Returns the cases of a suite whose questions have their own length."""
    if own_lengths:
        raise RTPurboError(
            f"the questions of {suite} have their own length: write {suite}, not {given}."
        )
    counts = _counts(suite, questions)
    tasks = named.split(",") if named else list(counts)
    for task in tasks:
        check_name(f"{suite} task", task, SUITES[suite])
    return [Case(suite, task, 0, min(samples or counts[task], counts[task])) for task in tasks]


def _counts(suite: str, questions: Mapping[str, Mapping[str, int]]) -> Mapping[str, int]:
    if suite not in questions:
        raise RTPurboError(
            f"the suite '{suite}' takes its questions from a file: name it with "
            f"--task-data {suite}=FILE."
        )
    return questions[suite]


def _check_count(case: Case, counts: Mapping[str, int]) -> None:
    there = counts.get(case.task, 0)
    if not 1 <= case.samples <= there:
        raise RTPurboError(
            f"there are {there} questions of {case.suite} {case.task}, not {case.samples or 'any'}: "
            "name another task, or ask for fewer."
        )


def _own_lengths(
    given: str,
    written: str,
    suite: str,
    lengths: Sequence[int] | Mapping[str, Sequence[int]],
    default: Sequence[int],
) -> Sequence[int]:
    """Returns the lengths written after a suite, else those for its name, else the default."""
    if written:
        return _parse_lengths(given, written)
    return lengths.get(suite, default) if isinstance(lengths, Mapping) else default


def _parse_lengths(suite: str, lengths: str) -> list[int]:
    try:
        return [int(length) for length in lengths.split(",")]
    except ValueError as error:
        raise RTPurboError(
            f"'{suite}' does not name lengths: write them as in perplexity@2048,8192."
        ) from error


def check_name(kind: str, name: str, known: Sequence[str] | Mapping[str, object]) -> None:
    """Refuses an unknown name, with a list of the known ones."""
    if name not in known:
        raise RTPurboError(f"there is no {kind} '{name}': choose from {', '.join(known)}.")

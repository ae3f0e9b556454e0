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

    Numbers of questions, by suite and task, are those of suites that read them from files.

    Raises:
        RTPurboError: a suite or task is unknown, a suite has no length, no tasks or no questions,
            or there are no samples.
    """
    if samples is not None and samples < 1:
        raise RTPurboError(f"the number of samples is {samples}, but it must be at least 1.")
    counts = questions or {}
    cases: list[Case] = []
    for given in suites:
        cases += [given] if isinstance(given, Case) else _cases(given, lengths, samples, counts)
    for case in cases:
        if case.suite in QUESTION_SUITES:
            there = _counts(case.suite, counts).get(case.task, 0)
            if not 1 <= case.samples <= there:
                raise RTPurboError(
                    f"there are {there} questions of {case.suite} {case.task}, not "
                    f"{case.samples or 'any'}: name another task, or ask for fewer."
                )
    return list(dict.fromkeys(cases))


def suite_of(given: str | Case) -> str:
    """Returns the name of the suite of an argument of `evaluate`."""
    return given.suite if isinstance(given, Case) else re.split("[:@]", given, maxsplit=1)[0]


def _cases(
    given: str,
    lengths: Sequence[int] | Mapping[str, Sequence[int]],
    samples: int | None,
    questions: Mapping[str, Mapping[str, int]],
) -> list[Case]:
    """Returns the cases of a suite, with the tasks and lengths that are written after its name."""
    name, _, written = given.partition("@")
    suite, _, named = name.partition(":")
    check_name("suite", suite, SUITES)
    counts = _counts(suite, questions) if suite in QUESTION_SUITES else {}
    tasks = named.split(",") if named else list(counts or DEFAULT_TASKS[suite])
    if suite != HARNESS:
        for task in tasks:
            check_name(f"{suite} task", task, SUITES[suite])
    elif not all(tasks) or not tasks:
        raise RTPurboError(f"the suite '{suite}' needs tasks, as in {suite}:aime24.")
    suite_lengths = _lengths(given, suite, written, lengths)
    cases = []
    for task in tasks:
        default = 0 if suite == HARNESS else counts[task] if suite in SHORT else DEFAULT_SAMPLES
        number = samples or default
        if counts:
            number = min(number, counts.get(task, 0))
        cases += [Case(suite, task, length, number) for length in suite_lengths]
    return cases


def _lengths(
    given: str, suite: str, written: str, lengths: Sequence[int] | Mapping[str, Sequence[int]]
) -> Sequence[int]:
    """Returns the lengths written after a suite, else those for its name, else the default."""
    if suite in SHORT:
        if written:
            raise RTPurboError(
                f"the questions of {suite} have their own length: write {suite}, not {given}."
            )
        return (0,)
    found: Sequence[int] = () if isinstance(lengths, Mapping) else lengths
    if suite == HARNESS:
        found = (0,)
    if written:
        try:
            found = [int(length) for length in written.split(",")]
        except ValueError as error:
            raise RTPurboError(
                f"'{given}' does not name lengths: write them as in perplexity@2048,8192."
            ) from error
    elif isinstance(lengths, Mapping):
        found = lengths.get(suite, found)
    if not found or (min(found) < 2 and found != (0,)):
        raise RTPurboError(f"the suite '{suite}' needs lengths of at least 2 tokens.")
    return found


def _counts(suite: str, questions: Mapping[str, Mapping[str, int]]) -> Mapping[str, int]:
    if suite not in questions:
        raise RTPurboError(
            f"the suite '{suite}' takes its questions from a file: name it with "
            f"--task-data {suite}=FILE."
        )
    return questions[suite]


def check_name(kind: str, name: str, known: Sequence[str] | Mapping[str, object]) -> None:
    """Refuses an unknown name, with a list of the known ones."""
    if name not in known:
        raise RTPurboError(f"there is no {kind} '{name}': choose from {', '.join(known)}.")

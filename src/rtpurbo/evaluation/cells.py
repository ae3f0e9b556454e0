"""Which tests to run: suites, tasks and lengths from what a user names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation import needle
from rtpurbo.evaluation.ruler.tasks import TASKS as RULER_TASKS

HARNESS = "lm-eval"
"""The suite of LM Evaluation Harness, which alone knows its tasks."""

SUITES: dict[str, tuple[str, ...]] = {
    "needle": tuple(needle.TASKS),
    "perplexity": ("prose",),
    "ruler": tuple(RULER_TASKS),
    HARNESS: (),
}
"""The tasks of every suite."""

DEFAULT_SAMPLES = 10

DEFAULT_SUITES = ("needle", "perplexity")
DEFAULT_TASKS = {**SUITES, "needle": ("single", "multikey")}
"""What a suite runs if no task is named."""


@dataclass(frozen=True)
class Cell:
    """One test that every policy takes.

    Attributes:
        suite: a name of `SUITES`.
        task: of the suite.
        context_length: tokens; 0 for the model's context, in the suite `lm-eval`.
        samples: questions or windows; 0 for all that there are, likewise.
    """

    suite: str
    task: str
    context_length: int
    samples: int

    def __str__(self) -> str:
        return f"{self.suite} {self.task} {self.context_length}"


def choose_cells(
    suites: Sequence[str | Cell],
    lengths: Sequence[int] | Mapping[str, Sequence[int]],
    samples: int | None = None,
) -> list[Cell]:
    """The tests that the arguments of `evaluate` name.

    Raises:
        RTPurboError: a suite or task is unknown, a suite has no length or no tasks, or there are no
            samples.
    """
    if samples is not None and samples < 1:
        raise RTPurboError(f"the number of samples is {samples}, but it must be at least 1.")
    cells: list[Cell] = []
    for given in suites:
        if isinstance(given, Cell):
            cells.append(given)
            continue
        name, _, own_lengths = given.partition("@")
        suite, _, named = name.partition(":")
        check_name("suite", suite, SUITES)
        tasks = named.split(",") if named else DEFAULT_TASKS[suite]
        if suite == HARNESS:
            if not all(tasks) or not tasks:
                raise RTPurboError(f"the suite '{suite}' needs tasks, as in {suite}:aime24.")
            suite_lengths = _own_lengths(given, own_lengths, suite, lengths, (0,))
            number = samples or 0
        else:
            for task in tasks:
                check_name(f"{suite} task", task, SUITES[suite])
            everybody = () if isinstance(lengths, Mapping) else lengths
            suite_lengths = _own_lengths(given, own_lengths, suite, lengths, everybody)
            number = samples or DEFAULT_SAMPLES
        if not suite_lengths or (min(suite_lengths) < 2 and suite_lengths != (0,)):
            raise RTPurboError(f"the suite '{suite}' needs lengths of at least 2 tokens.")
        cells += [Cell(suite, task, length, number) for task in tasks for length in suite_lengths]
    return list(dict.fromkeys(cells))


def _own_lengths(
    given: str,
    written: str,
    suite: str,
    lengths: Sequence[int] | Mapping[str, Sequence[int]],
    otherwise: Sequence[int],
) -> Sequence[int]:
    """The lengths written behind a suite, else those under its name, else others."""
    if written:
        return _parse_lengths(given, written)
    return lengths.get(suite, otherwise) if isinstance(lengths, Mapping) else otherwise


def _parse_lengths(suite: str, lengths: str) -> list[int]:
    try:
        return [int(length) for length in lengths.split(",")]
    except ValueError as error:
        raise RTPurboError(
            f"'{suite}' does not name lengths: write them as in perplexity@2048,8192."
        ) from error


def check_name(kind: str, name: str, known: Sequence[str] | Mapping[str, object]) -> None:
    """Refuses a name that is not among the known ones, and lists them."""
    if name not in known:
        raise RTPurboError(f"there is no {kind} '{name}': choose from {', '.join(known)}.")

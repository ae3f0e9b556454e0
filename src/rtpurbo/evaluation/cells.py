"""Which tests to run: suites, tasks and lengths from what a user names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation import needle
from rtpurbo.evaluation.ruler.tasks import TASKS as RULER_TASKS

SUITES: dict[str, tuple[str, ...]] = {
    "needle": tuple(needle.TASKS),
    "perplexity": ("prose",),
    "ruler": tuple(RULER_TASKS),
}
"""The tasks of every suite."""

DEFAULT_SUITES = ("needle", "perplexity")
DEFAULT_TASKS = {**SUITES, "needle": ("single", "multikey")}
"""What a suite runs if no task is named."""


@dataclass(frozen=True)
class Cell:
    """One test that every policy takes."""

    suite: str
    task: str
    context_length: int
    samples: int

    def __str__(self) -> str:
        return f"{self.suite} {self.task} {self.context_length}"


def choose_cells(
    suites: Sequence[str | Cell],
    lengths: Sequence[int] | Mapping[str, Sequence[int]],
    samples: int,
) -> list[Cell]:
    """The tests that the arguments of `evaluate` name.

    Raises:
        RTPurboError: a suite or task is unknown, a suite has no length, or there are no samples.
    """
    if samples < 1:
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
        for task in tasks:
            check_name(f"{suite} task", task, SUITES[suite])
        suite_lengths = lengths.get(suite, ()) if isinstance(lengths, Mapping) else lengths
        if own_lengths:
            suite_lengths = _parse_lengths(given, own_lengths)
        if not suite_lengths or min(suite_lengths) < 2:
            raise RTPurboError(f"the suite '{suite}' needs lengths of at least 2 tokens.")
        cells += [Cell(suite, task, length, samples) for task in tasks for length in suite_lengths]
    return list(dict.fromkeys(cells))


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

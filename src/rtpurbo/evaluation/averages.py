"""Averages of suites at a length, and their paired differences from the dense model's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from rtpurbo.evaluation.bootstrap import interval_of_mean
from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.questions.suites import NAMES as QUESTION_SUITES
from rtpurbo.evaluation.samples import Sample, SampleRecord

AVERAGED = ("ruler", *QUESTION_SUITES)
"""Suites with averages; tasks of other suites have no common scale."""


@dataclass(frozen=True)
class Average:
    """Mean over the tasks of a suite.

    Policies answer the same questions, so their difference has a much smaller variance than either
    mean: the difficulty of a question cancels out.

    Attributes:
        suite: as in `rtpurbo.evaluation.records.Record`, like the next two.
        context_length: tokens.
        policy: name.
        tasks: number of tasks, which all have the same weight.
        samples: number of questions of all tasks.
        score: in percent.
        ci95: 95 % interval of the score, by bootstrap over the questions of each task.
        difference: points above the dense model; None for the dense model, or if it has other questions.
        difference_ci95: the 95 % bootstrap interval of the difference, paired by question.
    """

    suite: str
    context_length: int
    policy: str
    tasks: int
    samples: int
    score: float
    ci95: tuple[float, float]
    difference: float | None = None
    difference_ci95: tuple[float, float] | None = None


_Answers = dict[str, dict[int, Sample]]
"""By task and number."""


def averages_of(samples: Sequence[SampleRecord]) -> list[Average]:
    """Returns the averages of all policies that have all tasks that any policy has at a length.

    Suites that are not `AVERAGED` are ignored.
    """
    taken: dict[tuple[str, int], dict[str, _Answers]] = {}
    for item in samples:
        if item.suite in AVERAGED:
            place = (item.suite, item.context_length)
            answers = taken.setdefault(place, {}).setdefault(item.policy, {})
            answers.setdefault(item.task, {})[item.number] = item.sample
    found = []
    for place, policies in taken.items():
        tasks = {task for answers in policies.values() for task in answers}
        dense = policies.get(DENSE_POLICY)
        for policy, answers in policies.items():
            if answers.keys() == tasks:
                reference = None if policy == DENSE_POLICY else dense
                found.append(_average(*place, policy, answers, reference))
    return found


def find_average(
    averages: Sequence[Average],
    context_length: int,
    policy: str,
    tasks: int,
    suite: str = "ruler",
) -> Average | None:
    """Returns the average of this number of tasks of a suite; None if there is none."""
    place = (suite, context_length, policy, tasks)
    found = (
        one for one in averages if (one.suite, one.context_length, one.policy, one.tasks) == place
    )
    return next(found, None)


def _average(
    suite: str, length: int, policy: str, answers: _Answers, dense: _Answers | None
) -> Average:
    scores = [[sample.score for sample in own.values()] for own in answers.values()]
    difference, interval = None, None
    if dense is not None and _questions(answers) == _questions(dense):
        gains = [
            [sample.score - dense[task][number].score for number, sample in own.items()]
            for task, own in answers.items()
        ]
        difference, interval = _mean(gains), interval_of_mean(gains)
    return Average(
        suite,
        length,
        policy,
        tasks=len(answers),
        samples=sum(map(len, scores)),
        score=_mean(scores),
        ci95=interval_of_mean(scores),
        difference=difference,
        difference_ci95=interval,
    )


def _mean(groups: Sequence[Sequence[float]]) -> float:
    return fmean(map(fmean, groups))


def _questions(answers: _Answers) -> dict[str, dict[int, str]]:
    return {
        task: {number: sample.prompt_hash for number, sample in own.items()}
        for task, own in answers.items()
    }

"""Differences to the dense model, judged by their 95 % intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from rtpurbo.evaluation.averages import Average
from rtpurbo.evaluation.records import Record

HEAVY = 5.0
"""Loss, in points or percent of perplexity, that counts as heavy if it is significant."""

NO_DIFFERENCE = 0.05
_Z = 1.96

Tint = Literal["", "slight", "heavy"]


@dataclass(frozen=True)
class Loss:
    """Loss against the dense model.

    Attributes:
        amount: points, or percent of perplexity; negative for a gain.
        is_chance: whether the 95 % interval allows for no difference; None without an interval.
        tolerance: loss that is never tinted.
    """

    amount: float
    is_chance: bool | None = None
    tolerance: float = 0.0

    @property
    def tint(self) -> Tint:
        """`heavy` only for a large loss outside the interval; `slight` for less certain or smaller."""
        if self.amount >= HEAVY:
            return "heavy" if self.is_chance is False else "slight"
        is_slight = self.amount > self.tolerance + NO_DIFFERENCE and not self.is_chance
        return "slight" if is_slight else ""

    @property
    def sign(self) -> str:
        """A triangle: down for a loss, filled if it is significant; empty without an interval."""
        if self.is_chance is None:
            return ""
        if self.amount > 0:
            return "▽ " if self.is_chance else "▼ "
        return "△ " if self.is_chance else "▲ "


def loss_of_record(record: Record, dense: Record) -> Loss:
    """Compares a score with the dense model's at the same test.

    Scores in percent without a recorded interval get Wilson's, from their number of samples. The
    difference counts as chance if either score lies in the other's interval: equal answers to few
    questions give an interval of no width, which is not sufficient alone.
    """
    own = _interval(record)
    other = dense.ci95 if record.ci95 is not None else _interval(dense)
    is_chance = None
    if own is not None:
        is_chance = _within(dense.score, own) or _within(record.score, other)
    if record.suite == "perplexity":
        amount = 100 * (record.score / dense.score - 1) if dense.score else 0.0
        return Loss(amount, is_chance, tolerance=1.0)
    return Loss(dense.score - record.score, is_chance)


def loss_of_mean(mean: float, dense: float, average: Average | None) -> Loss:
    """Compares a mean score with the dense model's, by the interval of the paired difference if recorded."""
    is_chance = None
    if average is not None and average.difference_ci95 is not None:
        is_chance = _within(0.0, average.difference_ci95)
    elif average is not None:
        is_chance = _within(dense, average.ci95)
    return Loss(dense - mean, is_chance)


def wilson_interval(percent: float, samples: int) -> tuple[float, float]:
    """Returns Wilson's 95 % interval of a share of right answers, in percent.

    Answers with partial credit vary less than right and wrong ones, for which it is too wide.
    """
    share, squared = percent / 100, _Z**2 / samples
    center = (share + squared / 2) / (1 + squared)
    half = math.sqrt(share * (1 - share) * squared + squared**2 / 4) / (1 + squared)
    return 100 * (center - half), 100 * (center + half)


def _interval(record: Record) -> tuple[float, float] | None:
    if record.ci95 is not None or record.suite == "perplexity" or record.samples < 1:
        return record.ci95
    return wilson_interval(min(max(record.score, 0.0), 100.0), record.samples)


def _within(value: float, interval: tuple[float, float] | None) -> bool:
    return interval is not None and interval[0] <= value <= interval[1]

"""Cells with a score and its difference to the dense model, told by sign, number and tint."""

from __future__ import annotations

from rtpurbo.evaluation.averages import Average
from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.records import Record
from rtpurbo.reporting.html.markup import Markup, tag
from rtpurbo.reporting.html.tables import NOTHING, cell

LEGEND = (
    "Small: the difference to the dense model (full), in points, or for perplexity in percent. "
    "A loss is tinted, strongly from 5 on. Where results have 95 % intervals (in brackets), ▼ is a "
    "loss and ▲ a gain in which neither score lies in the other's interval; ▽ and △ may be chance, "
    "and their tint is a step weaker. The brackets of a mean hold its difference, question by question."
)

_HEAVY = 5.0
_NO_DIFFERENCE = 0.05


def score_cell(record: Record | None, dense: Record | None) -> Markup:
    """A score with its interval.

    Args:
        record: what was measured, if it was.
        dense: the dense model's at the same test, if it was measured.
    """
    if record is None:
        return cell(NOTHING, class_="none")
    perplexity = record.suite == "perplexity"
    score = tag("b", f"{record.score:.2f}" if perplexity else _short(record.score))
    interval = None
    if record.ci95 is not None:
        low, high = (f"{end:.2f}" if perplexity else f"{end:.0f}" for end in record.ci95)
        interval = tag("span", f"[{low}, {high}]", class_="interval")
    if dense is None or record.policy == DENSE_POLICY:
        return cell(score, interval)
    if perplexity:
        worse = 100 * (record.score / dense.score - 1) if dense.score else 0.0
        written, slight = f"{worse:+.1f} %", 1.0
    else:
        worse = dense.score - record.score
        written, slight = f"{-worse:+.1f}", 0.0
    chance = None
    if record.ci95 is not None:
        # Few equal answers make an interval of no width, which is not to be believed alone.
        chance = _within(dense.score, record.ci95) or _within(record.score, dense.ci95)
    return _cell(score, interval, worse, written, slight, chance)


def mean_cell(mean: float | None, dense: float | None, average: Average | None = None) -> Markup:
    """A mean of scores, with the interval of its difference to the dense model's.

    Args:
        mean: the policy's, if it has all tests.
        dense: the dense model's, likewise; None of that itself.
        average: where results tell the same mean with an interval.
    """
    if mean is None:
        return cell(NOTHING, class_="none")
    score = tag("b", f"{mean:.1f}")
    if dense is None:
        return cell(score)
    worse, interval, chance = dense - mean, None, None
    if average is not None and average.difference_ci95 is not None:
        low, high = average.difference_ci95
        interval = tag("span", f"[{low:+.1f}, {high:+.1f}]", class_="interval")
        chance = low <= 0 <= high
    elif average is not None:
        # The dense model's answers are of another run: its mean alone can be looked for.
        chance = _within(dense, average.ci95)
    return _cell(score, interval, worse, f"{-worse:+.1f}", 0.0, chance)


def _cell(
    score: Markup,
    interval: Markup | None,
    worse: float,
    written: str,
    slight: float,
    chance: bool | None,
) -> Markup:
    if abs(worse) < _NO_DIFFERENCE:
        return cell(score, tag("span", "±0", class_="delta"), interval)
    sign = ""
    if chance is not None:
        sign = ("▽ " if chance else "▼ ") if worse > 0 else ("△ " if chance else "▲ ")
    difference = tag("span", f"{sign}{written}", class_="delta")
    return cell(score, difference, interval, class_=_tint(worse, slight, bool(chance)))


def _within(score: float, interval: tuple[float, float] | None) -> bool:
    return interval is not None and interval[0] <= score <= interval[1]


def _tint(worse: float, slight: float, chance: bool) -> str | None:
    if worse >= _HEAVY:
        return "slight" if chance else "heavy"
    return "slight" if worse > slight + _NO_DIFFERENCE and not chance else None


def _short(score: float) -> str:
    return f"{score:.1f}".removesuffix(".0")

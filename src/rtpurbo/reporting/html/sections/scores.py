"""Table cells with a score and its difference to the dense model."""

from __future__ import annotations

from rtpurbo.evaluation.averages import Average
from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.records import Record
from rtpurbo.reporting.html.view import NOTHING, Cell
from rtpurbo.reporting.losses import NO_DIFFERENCE, Loss, loss_of_mean, loss_of_record

LEGEND = (
    "Below each score: the difference to the dense model (full), in points, or for perplexity in "
    "percent, and 95 % intervals in brackets where the results have them. ▼ is a loss and ▲ a gain "
    "in which neither score lies in the other's interval; ▽ and △ may be chance. Scores without a "
    "recorded interval are judged by Wilson's, from the number of samples. Red marks a loss of at "
    "least 5 outside the interval; yellow a smaller one outside, or a larger one that may be chance "
    "or has no interval. The brackets of a mean hold its difference, paired by question."
)


def score_cell(record: Record | None, dense: Record | None) -> Cell:
    """Returns a score with its interval.

    Args:
        record: the measurement, if there is one.
        dense: the dense model's of the same test, if there is one.
    """
    if record is None:
        return Cell(NOTHING, tint="none", bold=False)
    perplexity = record.suite == "perplexity"
    score = f"{record.score:.2f}" if perplexity else f"{record.score:.1f}".removesuffix(".0")
    interval = ""
    if record.ci95 is not None:
        low, high = (f"{end:.2f}" if perplexity else f"{end:.0f}" for end in record.ci95)
        interval = f"[{low}, {high}]"
    if dense is None or record.policy == DENSE_POLICY:
        return Cell(score, lines=(interval,) if interval else ())
    return _cell(score, interval, loss_of_record(record, dense), perplexity)


def mean_cell(mean: float | None, dense: float | None, average: Average | None = None) -> Cell:
    """Returns a mean of scores, with the interval of its difference to the dense model's.

    Args:
        mean: the policy's, if it has all tests.
        dense: the dense model's; None for the dense model itself.
        average: the same mean with intervals, if recorded.
    """
    if mean is None:
        return Cell(NOTHING, tint="none", bold=False)
    if dense is None:
        return Cell(f"{mean:.1f}")
    interval = ""
    if average is not None and average.difference_ci95 is not None:
        low, high = average.difference_ci95
        interval = f"[{low:+.1f}, {high:+.1f}]"
    return _cell(f"{mean:.1f}", interval, loss_of_mean(mean, dense, average))


def _cell(score: str, interval: str, loss: Loss, perplexity: bool = False) -> Cell:
    lines = (interval,) if interval else ()
    if abs(loss.amount) < NO_DIFFERENCE:
        return Cell(score, "±0", lines)
    written = f"{loss.amount:+.1f} %" if perplexity else f"{-loss.amount:+.1f}"
    return Cell(score, f"{loss.sign}{written}", lines, loss.tint)

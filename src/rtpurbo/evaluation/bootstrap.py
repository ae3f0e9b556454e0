"""How sure a mean is: intervals by drawing its samples again and again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
# Draws of this many numbers are held at once.
_NUMBERS_AT_ONCE = 2**24


def bootstrap_interval(
    values: Sequence[float], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The interval that holds the middle 95 % of the means of resampled values.

    It knows no more than the values: where all are equal, as with nothing but right answers, it has
    no width.

    Args:
        values: at least one.
        resamples: how many means are drawn.
        seed: of the draws.
    """
    samples = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    at_once = max(1, _NUMBERS_AT_ONCE // len(samples))
    means = np.concatenate(
        [
            samples[
                rng.integers(0, len(samples), (min(at_once, resamples - start), len(samples)))
            ].mean(1)
            for start in range(0, resamples, at_once)
        ]
    )
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)

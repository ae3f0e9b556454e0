"""Bootstrap intervals of means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
CONFIDENCE = 0.95
# Maximum number of drawn numbers in memory.
_NUMBERS_AT_ONCE = 2**24


def bootstrap_interval(values: Sequence[float], resamples: int = RESAMPLES) -> tuple[float, float]:
    """Returns the interval of the middle 95 % of the means of resampled values, at least one.

    If all values are equal, for example if all answers are correct, its width is zero.
    """
    return interval_of_mean([values], resamples)


def interval_of_mean(
    groups: Sequence[Sequence[float]], resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Returns the interval of the mean over the means of several groups, each resampled separately.

    Tasks of a suite are such groups: their questions are a random sample, the tasks are not. There is at
    least one group of at least one value.
    """
    rng = np.random.default_rng(0)
    means = np.mean([_resampled_means(values, resamples, rng) for values in groups], axis=0)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def _resampled_means(
    values: Sequence[float], resamples: int, rng: np.random.Generator
) -> NDArray[np.float64]:
    samples = np.asarray(values, dtype=np.float64)
    at_once = max(1, _NUMBERS_AT_ONCE // len(samples))
    means = [
        samples[
            rng.integers(0, len(samples), (min(at_once, resamples - start), len(samples)))
        ].mean(1)
        for start in range(0, resamples, at_once)
    ]
    return np.concatenate(means)

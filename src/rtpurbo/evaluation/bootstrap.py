"""Bootstrap intervals of means."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
    return interval_of_mean([values], resamples, seed)


def interval_of_mean(
    groups: Sequence[Sequence[float]], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """The same of the mean of several groups' means, each of which is resampled within itself.

    Tasks of a suite are such groups: which there are is no matter of chance, their questions are.

    Args:
        groups: at least one, of at least one value each.
        resamples: how many means are drawn.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
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

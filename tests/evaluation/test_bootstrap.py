import numpy as np
import pytest

from rtpurbo.evaluation import bootstrap
from rtpurbo.evaluation.bootstrap import bootstrap_interval, interval_of_mean


def test_equal_values_give_an_interval_of_zero_width():
    assert bootstrap_interval([100.0] * 20) == (100.0, 100.0)
    assert bootstrap_interval([3.0]) == (3.0, 3.0)


def test_the_interval_is_that_of_a_mean():
    values = np.random.default_rng(1).normal(50, 10, 400)
    low, high = bootstrap_interval(values)
    error = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=0.1)


def test_the_same_values_give_the_same_interval(monkeypatch):
    values = [0.0, 100.0, 100.0, 50.0]
    once = bootstrap_interval(values)
    assert once == bootstrap_interval(values)
    assert once != bootstrap_interval(values, resamples=50)
    # However many numbers are drawn at once, all means are.
    monkeypatch.setattr(bootstrap, "_NUMBERS_AT_ONCE", 7)
    assert bootstrap_interval(values) == pytest.approx(once, abs=3)


def test_groups_are_resampled_within_themselves():
    # How far groups are apart is no matter of chance.
    assert interval_of_mean([[0.0] * 5, [100.0] * 3]) == (50.0, 50.0)
    rng = np.random.default_rng(2)
    groups = [rng.normal(mean, 10, size) for mean, size in ((0, 200), (80, 400))]
    low, high = interval_of_mean(groups)
    error = 1.96 * sum(group.var() / len(group) for group in groups) ** 0.5 / 2
    mean = sum(group.mean() for group in groups) / 2
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=0.1)

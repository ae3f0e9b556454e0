import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: rtpurbo[lm-eval] brings it")
from ruler_word_order import order_effect


def test_an_order_that_matters_is_told_from_one_that_does_not():
    rng = np.random.default_rng(0)
    scores = rng.choice([0.0, 100 / 3, 200 / 3, 100.0], (12, 8))
    share, chance = order_effect(scores)
    assert 0 < share < 0.25
    assert chance > 0.05
    share, chance = order_effect(scores + 40 * rng.standard_normal((12, 1)))
    assert share > 0.4
    assert chance < 0.001

from collections import Counter
from itertools import islice
from math import pi
from random import Random

import pytest

from rtpurbo.data.counting import (
    DOTS,
    code_text,
    code_words,
    shuffled_list,
    smallest_code_text,
    zeta,
    zipf_counts,
)


def test_zeta():
    assert zeta(2) == pytest.approx(pi**2 / 6, rel=1e-9)
    assert zeta(4) == pytest.approx(pi**4 / 90, rel=1e-9)


def test_a_list_has_the_requested_frequencies():
    entries = shuffled_list(["sun", "moon"], ["cup", "hat", "key"], 5, 2, seed=3)
    assert Counter(entries) == {"sun": 5, "moon": 5, "cup": 2, "hat": 2, "key": 2}
    assert entries != sorted(entries)


@pytest.mark.parametrize("alpha", [1.6, 2.0, 2.4])
def test_ranks_of_a_code_text_are_distinct(alpha):
    words = list(islice(code_words(Random(0)), 50))
    assert len(set(words)) == 50
    size = smallest_code_text(3, alpha)
    for more in range(100):
        counted = Counter(code_text(words, size + more, alpha, seed=1))
        ranked = [DOTS, *words[:4]]
        times = [counted[word] for word in ranked]
        assert times == list(zipf_counts(size + more, 51, alpha)[:5])
        assert times[3] > times[4]
        assert sorted(times, reverse=True) == times

import re
from collections import Counter

import pytest

from rtpurbo.data.counting import DOTS, zipf_counts
from rtpurbo.evaluation.ruler.aggregation import ALPHA
from tests.evaluation.ruler.support import draft_of, prompts_of


def test_counting_finds_the_three_frequent_words():
    for text, answers in prompts_of("fwe"):
        counted = Counter(coded(text.split("\n\n")[1]))
        (dots, most), *ranked = counted.most_common()
        assert dots == DOTS
        assert tuple(word for word, _ in ranked[:3]) == answers
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)
        for rank, (_, times) in enumerate(ranked, 2):
            assert times == pytest.approx(most / rank**2, abs=1.1)


@pytest.mark.parametrize("length", [800, 4096])
def test_the_third_is_never_as_rare_as_the_fourth(length):
    draft = draft_of("fwe", length=length)
    for size in range(draft.smallest, draft.smallest + 300):
        third, fourth = zipf_counts(size, 50, ALPHA)[3:5]
        assert third > fourth
        text = draft.text(size).split("\n\n")[1]
        assert len(coded(text)) == sum(zipf_counts(size, (length - 50) // 50, ALPHA))


def coded(text):
    return text.split(" ")

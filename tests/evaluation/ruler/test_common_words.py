import re
from collections import Counter

import pytest

from tests.evaluation.ruler.support import draft_of, prompts_of

LIST = re.compile(r"(?:\d+\. [\w-]+ ?)+")


@pytest.mark.parametrize(
    ("length", "frequencies", "example_frequencies", "example_words"),
    [(6144, {30: 10, 3: None}, {10: 10, 3: 30}, 40), (2048, {6: 10, 1: None}, {3: 10, 1: 10}, 20)],
)
def test_counting_finds_the_ten_common_words(
    length, frequencies, example_frequencies, example_words
):
    for text, answers in prompts_of("cwe", length=length):
        example, solution, asked = (listed(found) for found in LIST.findall(text))
        counted, shown = Counter(asked), Counter(example)
        assert {word for word, _ in counted.most_common(10)} == set(answers)
        assert Counter(shown.values()) == example_frequencies
        assert len(shown) == example_words
        assert {word for word, _ in shown.most_common(10)} == set(solution)
        assert not set(shown) & set(counted)
        rest = len(counted) - 10
        assert rest >= 10
        assert Counter(counted.values()) == {
            times: words or rest for times, words in frequencies.items()
        }


def test_common_words_are_found_in_no_other():
    draft = draft_of("cwe")
    words = set(listed(LIST.findall(draft.text(3000))[-1]))
    assert len(words) == 3010
    assert any("-" in word for word in words)  # compounds where plain words ran out
    for answer in draft.answers:
        assert [word for word in words if answer in word] == [answer]


def listed(text):
    entries = re.findall(r"(\d+)\. ([\w-]+)", text)
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    return [word for _, word in entries]

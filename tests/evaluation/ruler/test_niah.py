import re

import pytest

from tests.evaluation.ruler.support import draft_of, materials, prompts_of

WORDS, NUMBER = r"[a-z]+-[a-z]+", r"[1-9]\d{6}"
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"

# The key, the value, and how many of each: keys, values of a key, queries.
SHAPES = {
    "niah_single_1": (WORDS, NUMBER, 1, 1, 1),
    "niah_single_2": (WORDS, NUMBER, 1, 1, 1),
    "niah_single_3": (WORDS, UUID, 1, 1, 1),
    "niah_multikey_1": (WORDS, NUMBER, 4, 1, 1),
    "niah_multikey_2": (WORDS, NUMBER, None, 1, 1),
    "niah_multikey_3": (UUID, UUID, None, 1, 1),
    "niah_multivalue": (WORDS, NUMBER, 1, 4, 1),
    "niah_multiquery": (WORDS, NUMBER, 4, 1, 4),
}


@pytest.mark.parametrize("task", SHAPES)
def test_the_needles_contain_the_answers(task):
    key, value, num_keys, num_values, num_queries = SHAPES[task]
    for text, answers in prompts_of(task):
        kind = "number" if value is NUMBER else "uuid"
        needles = re.findall(rf"special magic {kind}s for ({key}) is: ({value})\.", text)
        assert len(needles) == len(re.findall("special magic \\w+ for \\S+ is: ", text))
        held = {}
        for name, number in needles:
            held.setdefault(name, []).append(number)
        assert {len(numbers) for numbers in held.values()} == {num_values}
        assert len({number for _, number in needles}) == len(needles)
        assert len(held) == num_keys if num_keys else len(held) > 30
        [asked] = re.findall(r"special magic \w+ for (.+?) mentioned in the provided text\?", text)
        queries = re.findall(key, asked)
        assert len(set(queries)) == num_queries
        # A key occurs only in its needles, the question and the opening of the answer.
        assert all(len(re.findall(rf"\b{name}\b", text)) == num_values + 2 for name in queries)
        assert sorted(answers) == sorted(number for name in queries for number in held[name])
        assert ("quiz you about the " + kind + "s" * (len(answers) > 1) + " afterwards") in text


@pytest.mark.parametrize("task", ["niah_single_1", "niah_multikey_2", "niah_multiquery"])
def test_needles_are_at_any_depth(task):
    depths = []
    for number in range(40):
        draft = draft_of(task, number)
        text = draft.text(draft.smallest * 4)
        depths += [text.index(answer) / len(text) for answer in draft.answers]
    assert min(depths) < 0.2
    assert max(depths) > 0.8
    assert 0.35 < sum(depths) / len(depths) < 0.65


def test_a_larger_haystack_contains_the_smaller_one():
    draft = draft_of("niah_multikey_2")
    small, large = (set(draft.text(size).splitlines()) for size in (10, 50))
    assert small < large
    assert len(large - small) == 40
    # In whatever order sizes were tried.
    again = draft_of("niah_multikey_2")
    assert again.text(10) == draft.text(10)


def test_short_prose_wraps_around():
    essay = " ".join(materials().essay)
    text = draft_of("niah_single_2").text(3 * len(materials().essay))
    passage = essay[5000:5100]
    assert text.count(passage) in (2, 3)

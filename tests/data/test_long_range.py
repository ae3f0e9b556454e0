import random
import re

import pytest

from rtpurbo.data.long_range import LongRangeMix, passage_question
from rtpurbo.data.words import key_names
from tests.data.test_needles import NEEDLE, corpus
from tests.tiny_tokenizer import tiny_tokenizer

LENGTH = 6000


def parts(mix, kind, seed):
    """The text of a sequence, and that of its answers."""
    sequence = getattr(mix, kind)(LENGTH, random.Random(seed))
    assert 0.98 * LENGTH <= len(sequence) <= LENGTH
    ids = sequence.input_ids
    assert sequence.answer_spans[-1][1] == len(ids)
    answers = [mix.tokenizer.decode(ids[slice(*span)]) for span in sequence.answer_spans]
    return mix.tokenizer.decode(ids), answers


def mix(has_template=True):
    tokenizer = tiny_tokenizer() if has_template else tiny_tokenizer(chat_template=None)
    return LongRangeMix(tokenizer, corpus())


@pytest.mark.parametrize("has_template", [True, False])
def test_every_question_about_needles_has_its_numbers(has_template):
    most_questions = most_values = 0
    for seed in range(12):
        text, answers = parts(mix(has_template), "needles", seed)
        needles = NEEDLE.findall(text)
        asked = re.findall(r"What (?:is|are).* numbers? for ([\w-]+) mentioned", text)
        assert len(asked) == len(answers) == len(set(asked))
        assert set(asked) <= set(key_names("train"))
        for key, answer in zip(asked, answers, strict=True):
            numbers = [number for name, number in needles if name == key]
            assert re.findall(r"\d+", answer) == numbers
            most_values = max(most_values, len(numbers))
        most_questions = max(most_questions, len(asked))
    assert most_questions > 4
    assert most_values > 1


@pytest.mark.parametrize("has_template", [True, False])
def test_every_chain_is_asked_for(has_template):
    counts = set()
    for seed in range(6):
        text, answers = parts(mix(has_template), "variables", seed)
        counts.add(len(answers))
        for value, answer in zip(re.findall(r"the value (\d+) in", text), answers, strict=True):
            first = answer.split()[0]
            assert f"VAR {first} = {value}." in text
    assert len(counts) > 1


def test_a_passage_goes_on_as_it_does_in_the_text():
    text, [answer] = parts(mix(), "passage", 0)
    [quote] = re.findall(r'passage of the text go on\? "(.*)"', text)
    assert f"{quote}{answer}" in text
    assert passage_question("", 0.5).answer == " "


def test_sequences_are_drawn_by_number():
    draw = mix().sequence
    lengths = {len(draw(number, 1500)) for number in range(20)}
    assert max(lengths) == 1500
    assert min(lengths) >= 1500 - 16
    assert draw(7, 1500) == draw(7, 1500)
    assert draw(7, 1500) != draw(8, 1500)
    assert any(not draw(number, 1500).answer_spans for number in range(6))

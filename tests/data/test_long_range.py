import random
import re
from collections import Counter

import pytest

from rtpurbo.data.counting import DOTS, LIST_INTRODUCTION
from rtpurbo.data.long_range import DULL, HAYSTACKS, LongRangeMix, passage_question
from rtpurbo.data.variables import INTRODUCTION
from rtpurbo.data.words import key_names
from rtpurbo.evaluation.ruler.noise import NOISE
from tests.data.test_needles import corpus
from tests.tiny_tokenizer import tiny_tokenizer

LENGTH = 6000


UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
ANY_NEEDLE = re.compile(
    rf"One of the special magic (?:number|uuid)s for ([\w-]+) is: (\d{{7}}|{UUID})\."
)


def parts(mix, kind, seed, *options):
    """The text of a sequence, and that of its answers."""
    sequence = getattr(mix, kind)(LENGTH, random.Random(seed), *options)
    assert 0.98 * LENGTH <= len(sequence) <= LENGTH
    ids = sequence.input_ids
    assert sequence.answer_spans[-1][1] == len(ids)
    answers = [mix.tokenizer.decode(ids[slice(*span)]) for span in sequence.answer_spans]
    return mix.tokenizer.decode(ids), answers


def mix(has_template=True):
    tokenizer = tiny_tokenizer() if has_template else tiny_tokenizer(chat_template=None)
    return LongRangeMix(tokenizer, corpus())


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_every_question_about_needles_has_its_values(has_template, haystack):
    most_questions = most_values = 0
    for seed in range(16):
        text, answers = parts(mix(has_template), "needles", seed, haystack)
        needles = ANY_NEEDLE.findall(text)
        asked = re.findall(r"What (?:is|are).* (?:number|uuid)s? for (.+) mentioned in", text)
        assert len(asked) == len(answers) == len(set(asked))
        for keys, answer in zip(asked, answers, strict=True):
            keys = re.split(", and |, ", keys)
            assert all(key in key_names("train") or re.fullmatch(UUID, key) for key in keys)
            values = [value for key in keys for name, value in needles if name == key]
            assert re.findall(rf"{UUID}|\b\d{{7}}\b", answer) == values
            most_values = max(most_values, len(values) if len(keys) == 1 else 0)
        most_questions = max(most_questions, len(asked))
    assert most_questions > 4
    assert most_values > 1


def test_needles_hide_among_needles_with_other_keys():
    kinds = set()
    for seed in range(8):
        text, _ = parts(mix(), "needles", seed, "needles")
        needles = ANY_NEEDLE.findall(text)
        assert len(needles) > 30
        assert len({value for _, value in needles}) == len(needles)
        kinds |= {(len(key) == 36, len(value) == 36) for key, value in needles}
        assert len({len(key) == 36 for key, _ in needles}) == 1
    assert kinds == {(False, False), (False, True), (True, True)}


@pytest.mark.parametrize("haystack", ["needles", "noise"])
def test_nothing_in_the_layout_tells_which_lines_are_asked_for(haystack):
    for seed in range(8):
        text, _ = parts(mix(), "needles", seed, haystack)
        haystack_lines = text.partition("afterwards.\n\n")[2].partition("\n\n")[0].split("\n")
        needles = [line for line in haystack_lines if line not in DULL]
        assert needles
        assert all(ANY_NEEDLE.fullmatch(line) for line in needles)


def test_keys_do_not_end():
    keys = mix()._keys(random.Random(0), False)
    many = [next(keys) for _ in range(10_000)]
    assert len(set(many)) == 10_000
    assert set(many) > set(key_names("train"))
    assert not set(many) & set(key_names("test"))


def test_noise_is_not_the_noise_of_tests():
    assert not set(NOISE) & set(DULL)
    text, _ = parts(mix(), "needles", 3, "noise")
    assert sum(text.count(sentence) for sentence in DULL) > 30


def test_a_solved_example_has_other_variables():
    shown = 0
    for seed in range(12):
        sequence = mix().variables(LENGTH, random.Random(seed), "noise")
        text = mix().tokenizer.decode(sequence.input_ids)
        assert len(sequence) >= 0.98 * LENGTH
        solved, _, asked = text.rpartition(INTRODUCTION)
        if "they are:" in solved:
            shown += 1
            names = re.findall(r"VAR (\w+) =", solved)
            assert names
            assert not set(names) & set(re.findall(r"VAR (\w+) =", asked))
    assert 0 < shown < 12


@pytest.mark.parametrize("has_template", [True, False])
def test_every_chain_is_asked_for(has_template):
    counts = set()
    for seed in range(6):
        text, answers = parts(mix(has_template), "variables", seed)
        counts.add(len(answers))
        text = text.rpartition(INTRODUCTION)[2]
        for value, answer in zip(re.findall(r"the value (\d+) in", text), answers, strict=True):
            first = answer.split()[0]
            assert f"VAR {first} = {value}." in text
    assert len(counts) > 1


def test_a_passage_goes_on_as_it_does_in_the_text():
    text, [answer] = parts(mix(), "passage", 0)
    [quote] = re.findall(r'passage of the text go on\? "(.*)"', text)
    assert f"{quote}{answer}" in text
    assert passage_question("", 0.5).answer == " "


@pytest.mark.parametrize("has_template", [True, False])
def test_who_counts_finds_the_answer(has_template):
    kinds = set()
    for seed in range(16):
        text, [answer] = parts(mix(has_template), "counting", seed)
        if "code words" in text:
            body = text.partition("most frequent ones.\n\n")[2].partition("\n\n")[0]
            ranked = [word for word, _ in Counter(body.split(" ")).most_common()]
            assert ranked[0] == DOTS
            assert answer.split() == ranked[1:4]
            kinds.add("code")
            continue
        *examples, last = text.split(LIST_INTRODUCTION)[1:]
        kinds.add(f"list, {len(examples)} examples")
        for part in (*examples, last):
            body, _, asked = part.strip().partition("\n\n")
            solution = re.findall(r"\d+\. ([\w-]+)", asked)
            counted = Counter(re.findall(r"\d+\. ([\w-]+)", body))
            times = dict(counted.most_common(len(solution)))
            assert set(times) == set(solution)
            assert len(set(times.values())) == 1
            assert max(set(counted.values()) - set(times.values())) * 2 <= max(times.values())
            assert sorted(solution, key=list(counted).index) == solution
            assert set(counted) <= set(key_names("train"))
    assert kinds == {"code", "list, 0 examples", "list, 1 examples"}


@pytest.mark.parametrize("length", [1024, 4096, 8192])
def test_counting_fits_lists_of_every_length(length):
    for seed in range(40):
        assert len(mix().counting(length, random.Random(seed))) <= length


@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_short_sequences_have_room_for_what_is_asked(haystack):
    for seed in range(60):
        assert len(mix().needles(2048, random.Random(seed), haystack)) <= 2048
        assert len(mix().variables(2048, random.Random(seed))) <= 2048


def of_prose(length):
    for seed in range(6):
        yield mix().needles(length, random.Random(seed), "prose")
        yield mix().variables(length, random.Random(seed), "prose")


def test_sequences_are_drawn_by_number():
    draw = mix().sequence
    lengths = {len(draw(number, 1500)) for number in range(20)}
    assert max(lengths) == 1500
    # Haystacks grow by a line, prose by a token.
    assert min(lengths) >= 1500 - 50
    assert all(len(sequence) >= 1500 - 16 for sequence in of_prose(1500))
    assert draw(7, 1500) == draw(7, 1500)
    assert draw(7, 1500) != draw(8, 1500)
    assert any(not draw(number, 1500).answer_spans for number in range(6))

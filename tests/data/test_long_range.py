import random
import re
from collections import Counter

import pytest

from rtpurbo.data.counting import DOTS
from rtpurbo.data.long_range import HAYSTACKS, LongRangeMix, passage_question
from rtpurbo.data.wordings import fill, templates
from rtpurbo.data.words import key_names
from tests.data.readers import UUID, VALUE, filler, follow, keys_and_values, read_needles, values_of
from tests.data.test_needles import corpus
from tests.tiny_tokenizer import tiny_tokenizer

LENGTH = 6000


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


def haystack_of(mix, sequence):
    """The text before the first question."""
    first, _ = sequence.answer_spans[0]
    text = mix.tokenizer.decode(sequence.input_ids[:first])
    before, _, question = text.rpartition("\n\n") if "<|im_start|>" in text else cut(text)
    assert question
    return before


def cut(text):
    """Without a chat template, the opening of the answer follows the question after an empty line."""
    before, _, opening = text.rpartition("\n\n")
    before, _, question = before.rpartition("\n\n")
    return before, "", f"{question}\n\n{opening}"


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_every_question_about_needles_has_its_values(has_template, haystack):
    drawn = mix(has_template)
    most_questions = most_values = 0
    for seed in range(40):
        sequence = drawn.needles(LENGTH, random.Random(seed), haystack)
        assert 0.98 * LENGTH <= len(sequence) <= LENGTH
        needles = read_needles(haystack_of(drawn, sequence))
        end = len(drawn.tokenizer.encode(haystack_of(drawn, sequence)))
        asked = set()
        for start, stop in sequence.answer_spans:
            question = drawn.tokenizer.decode(sequence.input_ids[end:start])
            answer = drawn.tokenizer.decode(sequence.input_ids[start:stop])
            end = stop
            names = {name for pair in needles for name in pair}
            keys = [each for each in keys_and_values(question) if each in names]
            held = values_of(needles, keys)
            assert held
            assert not asked & set(held)
            asked |= set(held)
            assert re.findall(VALUE, answer) == [value for each in held.values() for value in each]
            assert all(key in key_names("train") or re.fullmatch(UUID, key) for key in held)
            most_values = max(most_values, *map(len, held.values()))
        most_questions = max(most_questions, len(sequence.answer_spans))
    assert most_questions > 4
    assert most_values > 1


def test_needles_hide_among_needles_with_other_keys():
    kinds = set()
    for seed in range(16):
        drawn = mix()
        sequence = drawn.needles(LENGTH, random.Random(seed), "needles")
        needles = read_needles(haystack_of(drawn, sequence))
        assert len(needles) > 30
        assert len({each for pair in needles for each in pair}) > len(needles)
        kinds.add(tuple(sorted(len(each) == 36 for each in needles[0])))
        assert len({tuple(len(each) == 36 for each in pair) for pair in needles}) == 1
    assert kinds == {(False, False), (False, True), (True, True)}


def test_a_lookup_hides_needles_among_needles():
    drawn = mix().lookup(LENGTH, random.Random(3))
    assert drawn == mix().needles(LENGTH, random.Random(3), "needles")
    assert drawn != mix().needles(LENGTH, random.Random(3), "prose")


@pytest.mark.parametrize("haystack", ["needles", "noise"])
def test_the_layout_does_not_reveal_the_requested_lines(haystack):
    for seed in range(16):
        drawn = mix()
        text = haystack_of(drawn, drawn.needles(LENGTH, random.Random(seed), haystack))
        lines = text.partition("\n\n")[2].split("\n")
        needles = [line for line in lines if not filler(line)]
        assert needles
        shapes = {
            re.sub(rf"{UUID}|\b\d{{6,9}}\b|[a-z]+-[a-z]+(-\d+)?", "_", line) for line in needles
        }
        assert len(shapes) == 1


def test_keys_are_unlimited():
    keys = mix()._keys(random.Random(0), False)
    many = [next(keys) for _ in range(10_000)]
    assert len(set(many)) == 10_000
    assert set(many) > set(key_names("train"))
    assert not set(many) & set(key_names("test"))


def test_filler_is_repeated_between_the_needles():
    different = set()
    for seed in range(30):
        drawn = mix()
        text = haystack_of(drawn, drawn.needles(LENGTH, random.Random(seed), "noise"))
        lines = [line for line in text.split("\n") if filler(line)]
        assert len(lines) > 60
        different.add(len(set(lines)))
    assert {3, 4, 5, 6, 30} <= different
    assert max(different) > 60


def test_a_solved_example_has_other_variables():
    shown = 0
    for seed in range(30):
        drawn = mix()
        sequence = drawn.chains(LENGTH, random.Random(seed), "noise")
        text = drawn.tokenizer.decode(sequence.conversation.input_ids)
        assert 0.98 * LENGTH <= len(sequence.conversation) <= LENGTH
        solved, separator, asked = text.partition("\n\n\n")
        shown += bool(separator)
        if separator:
            assert all(each not in solved for each in sequence.assignments)
        assert all((asked or text).count(each) == 1 for each in sequence.assignments)
    assert 0 < shown < 30


@pytest.mark.parametrize("has_template", [True, False])
def test_following_the_assignments_gives_the_answer(has_template):
    counts = set()
    for seed in range(60):
        drawn = mix(has_template)
        sequence = drawn.chains(LENGTH, random.Random(seed))
        ids, spans = sequence.conversation.input_ids, sequence.conversation.answer_spans
        counts.add(len(spans))
        text = drawn.tokenizer.decode(ids)
        in_order = sorted(sequence.assignments, key=text.index)
        answers = [re.findall(r"[A-Za-z]\w+", drawn.tokenizer.decode(ids[slice(*span)]))
                   for span in spans]  # fmt: skip
        for value, (start, _), answer in zip(sequence.values, spans, answers, strict=True):
            names = [name for name in answer if name != "and"]
            # Other chains share no name with this one.
            own = [each for each in in_order if re.search("|".join(map(re.escape, names)), each)]
            assert follow(own, names) == dict.fromkeys(names, value)
            assert value in drawn.tokenizer.decode(ids[start - 80 : start])
    assert len(counts) > 1


def test_a_passage_continues_as_in_the_text():
    asked = set()
    for seed in range(30):
        text, [answer] = parts(mix(), "passage", seed)
        # In the text itself, the answer follows the quotation.
        before, found, _ = text.partition(answer.strip())
        assert found
        quote = " ".join(before.split()[-20:])
        question = " ".join(text.rpartition("<|im_start|>assistant")[0].split())
        assert question.count(quote) == 2
        asked.add(question.rpartition("knocked.")[2])
    assert len(asked) > 4
    assert passage_question("", 0.5, "Next: {quote}", "It is").answer == " "


@pytest.mark.parametrize("has_template", [True, False])
@pytest.mark.parametrize("kind", ["lists", "code_words"])
def test_counting_gives_the_answer(has_template, kind):
    layouts, examples = set(), 0
    word = r"[a-z]+-[a-z]+" if kind == "lists" else r"\b[a-z]{4,8}\b|\.\.\."
    kinds = [fill(each, count="(.*)") for each in templates("train")[kind]["introductions"]]
    for seed in range(80):
        text, [answer] = parts(mix(has_template), "counting", seed)
        *_, text = text.rpartition("\n\n\n")[1:] if "\n\n\n" in text else (text,)
        introduction, _, rest = text.removeprefix("<|im_start|>user\n").partition("\n\n")
        if introduction not in kinds:
            continue
        body, _, question = rest.partition("\n\n")
        layouts.add(re.sub(word, "_", body)[:3])
        counted = Counter(re.findall(word, body))
        solution = re.findall(word, answer)
        assert all(each not in question.partition(answer)[0] for each in solution)
        if kind == "code_words":
            ranked = [each for each, _ in counted.most_common()]
            assert ranked[0] == DOTS
            assert solution == ranked[1:4]
            continue
        times = dict(counted.most_common(len(solution)))
        assert set(times) == set(solution)
        assert len(set(times.values())) == 1
        assert max(set(counted.values()) - set(times.values())) * 2 <= max(times.values())
        assert sorted(solution, key=list(counted).index) == solution
        assert set(counted) <= set(key_names("train"))
        examples += 1
    assert len(layouts) > 2
    assert kind == "code_words" or examples > 20


def test_solved_examples_of_lists_are_right():
    found = 0
    for seed in range(60):
        drawn = mix()
        ids = drawn.counting(2 * LENGTH, random.Random(seed)).input_ids
        text = drawn.tokenizer.decode(ids)
        example, separator, _ = text.partition("\n\n\n")
        if separator:
            found += 1
            _, body, question, solution = example.split("\n\n")
            words = re.findall(r"[a-z]+-[a-z]+", solution)
            counted = Counter(re.findall(r"[a-z]+-[a-z]+", body))
            assert {word for word, _ in counted.most_common(len(words))} == set(words)
            assert str(len(words)) in question
    assert found > 5


@pytest.mark.parametrize("length", [1024, 4096, 8192])
def test_counting_fits_lists_of_every_length(length):
    for seed in range(40):
        assert len(mix().counting(length, random.Random(seed))) <= length


@pytest.mark.parametrize("haystack", HAYSTACKS)
def test_short_sequences_have_room_for_their_questions(haystack):
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
    assert min(lengths) >= 1500 - 100
    assert all(len(sequence) >= 1500 - 16 for sequence in of_prose(1500))
    assert draw(7, 1500) == draw(7, 1500)
    assert draw(7, 1500) != draw(8, 1500)
    assert any(not draw(number, 1500).answer_spans for number in range(6))

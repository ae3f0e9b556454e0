"""Plain questions about one or two of many paragraphs."""

import re
from random import Random

import pytest

from rtpurbo.data.reading import reading_example
from rtpurbo.data.texts import TextCorpus, load_texts
from rtpurbo.data.wordings import templates
from rtpurbo.errors import RTPurboError
from tests.tiny_tokenizer import tiny_tokenizer

WORDED = templates("train")["reading"]
HEADING = re.compile(
    "|".join(re.escape(each).replace(r"\{number\}", r"(\d+)") for each in WORDED["headings"])
)

PLAIN = TextCorpus("plain", ("we walk along the quiet road and rest under a tree. " * 2000,))
"""Prose without capital letters: every capital is part of an invented fact."""

LEADS_ON = re.compile(r"the (town|person) |first mayor of")
"""Paraphrases that replace the name of the subject."""


def text_and_answer(length, seed, corpus=PLAIN):
    tokenizer = tiny_tokenizer()
    example = reading_example(tokenizer, corpus, length, Random(seed))
    [(start, end)] = example.answer_spans
    assert end == len(example) <= length
    ids = example.input_ids
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:end]).strip(), len(ids)


def paragraphs(text):
    """Each numbered text as its heading and what follows."""
    introduced, _, body = text[: text.rindex("\n\n")].partition("\n\n")
    assert introduced.removeprefix("<|im_start|>user\n") in WORDED["introductions"]
    return [each.split("\n", 1) for each in body.strip().split("\n\n")]


def paragraphs_of(text):
    """Returns the facts about people and places by name."""
    texts = [body.split("\n")[-1] for _, body in paragraphs(text) if body != body.lower()]
    found = {re.match(r"[A-Z]\w+( [A-Z]\w+)?", each).group(): each for each in texts}
    assert len(found) == len(texts)
    return found


def question(text):
    return text[text.rindex("\n\n") :].partition("<|im_end|>")[0].strip()


def test_the_same_seed_asks_the_same():
    assert text_and_answer(3000, 1) == text_and_answer(3000, 1)
    assert text_and_answer(3000, 1) != text_and_answer(3000, 2)


@pytest.mark.parametrize("length", [1500, 6000, 20000])
def test_a_conversation_fills_its_length(length):
    for seed in range(4):
        *_, found = text_and_answer(length, seed, load_texts(None))
        assert 0.985 * length <= found


def test_prose_without_spaces_is_cut_too():
    unspaced = TextCorpus("unspaced", ("\u9053\u53ef\u9053\u975e\u5e38\u9053\u3002" * 9000,))
    text, _, found = text_and_answer(3000, 0, unspaced)
    assert found > 2900
    assert len(paragraphs(text)) > 2


def test_paragraphs_are_numbered_in_turn():
    for seed in range(8):
        texts = paragraphs(text_and_answer(6000, seed)[0])
        numbers = [HEADING.fullmatch(heading) for heading, _ in texts]
        assert [next(filter(None, each.groups())) for each in numbers] == [
            str(number) for number in range(1, len(texts) + 1)
        ]


def test_a_question_leads_to_its_answer_directly_or_through_another_paragraph():
    num_hops = []
    for seed in range(40):
        text, answer, _ = text_and_answer(6000, seed)
        asked, found = question(text), paragraphs_of(text)
        [name] = [name for name in found if re.search(rf"\b{name}\b", asked)]
        if LEADS_ON.search(asked):
            [name] = [other for other in found if other != name and other in found[name]]
            assert name not in asked
        assert answer in found[name]
        num_hops.append(1 + bool(LEADS_ON.search(asked)))
    assert 8 < num_hops.count(2) < 25


def test_longer_sequences_have_more_paragraphs():
    counts = {
        length: {len(paragraphs_of(text_and_answer(length, seed)[0])) for seed in range(16)}
        for length in (1000, 3000, 9000, 20000)
    }
    assert counts == {1000: {2}, 3000: {2, 6}, 9000: {2, 6, 14}, 20000: {2, 6, 14, 42}}


def test_paragraphs_have_titles_in_half_of_them():
    titled = 0
    for seed in range(30):
        bodies = [body for _, body in paragraphs(text_and_answer(1500, seed)[0])]
        with_title = {"\n" in body for body in bodies if body != body.lower()}
        assert len(with_title) == 1
        titled += with_title.pop()
    assert 8 < titled < 22


def test_facts_are_at_any_depth():
    first = [[body != body.lower() for _, body in paragraphs(text_and_answer(4000, seed)[0])]
             for seed in range(30)]  # fmt: skip
    depths = [each.index(True) / len(each) for each in first]
    assert min(depths) < 0.1
    assert max(depths) > 0.5


def test_too_short_a_length_is_refused():
    with pytest.raises(RTPurboError, match=r"about 2 paragraphs .* does not fit into 40 tokens"):
        text_and_answer(40, 0)


def test_several_questions_ask_about_different_paragraphs():
    tokenizer = tiny_tokenizer()
    counts = set()
    for seed in range(20):
        example = reading_example(tokenizer, PLAIN, 8000, Random(seed), most_questions=4)
        answers = [
            tokenizer.decode(example.input_ids[slice(*s)]).strip() for s in example.answer_spans
        ]
        text = tokenizer.decode(example.input_ids[: example.answer_spans[0][0]])
        assert len(example) <= 8000
        assert all(answer.strip(" .") in text for answer in answers)
        counts.add(len(answers))
    assert max(counts) == 4

"""Invented people and places, and the facts about them."""

import json
from importlib import resources
from itertools import islice
from random import Random

import pytest

from rtpurbo.data.inventions import FAMILY_NAMES, NUM_FACTS, PEOPLE, PLACES, TOWNS, subjects


def drawn(seed, count):
    return list(islice(subjects(Random(seed)), count))


def test_the_same_seed_invents_the_same():
    assert drawn(3, 5) == drawn(3, 5)
    assert drawn(3, 5) != drawn(4, 5)


def test_the_first_of_a_pair_leads_to_the_second_and_kinds_alternate():
    pairs = drawn(0, 6)
    for first, second in pairs:
        assert first.other == second.name
        assert (first.name in TOWNS) != (second.name in TOWNS)
    leading = [first.name in TOWNS for first, _ in pairs]
    assert leading == [leading[0], not leading[0]] * 3


def test_names_are_distinct():
    names = [subject.name for pair in subjects(Random(1)) for subject in pair]
    assert len(set(names)) == len(names) > 200


def test_a_paragraph_contains_every_fact_once():
    for pair in drawn(2, 20):
        for subject in pair:
            text = subject.paragraph(Random(0))
            assert text.startswith(subject.name)
            assert text.count(subject.name) == 1
            assert subject.other in text
            assert len(subject.facts) == NUM_FACTS
            for fact, value in subject.facts:
                before, after = fact.sentence.removeprefix("{who}").split("{value}")
                assert text.count(before + value + after) == 1
            assert "{" not in text


def test_sentences_are_in_random_order():
    [(subject, _)] = drawn(5, 1)
    assert len({subject.paragraph(Random(seed)) for seed in range(50)}) > 10


def test_a_paraphrase_keeps_the_other_name():
    for first, second in drawn(6, 20):
        assert first.name in first.paraphrase_of_other()
        assert second.name not in first.paraphrase_of_other()


@pytest.mark.parametrize("kind", [PEOPLE, PLACES])
def test_every_fact_can_be_asked_for(kind):
    questions = [fact.question.format(name="NAME") for fact in kind.facts]
    assert len(set(questions)) == len(questions)
    for question, fact in zip(questions, kind.facts, strict=True):
        assert "NAME" in question
        assert question.endswith("?")
        assert len(set(fact.values)) == len(fact.values) > NUM_FACTS


def test_nothing_is_shared_with_the_passages_of_rulers_questions():
    text = resources.files("rtpurbo.evaluation.ruler").joinpath("passages.json").read_text("utf-8")
    data = json.loads(text)
    titles = " ".join(passage["title"] for passage in data["passages"])
    # Given names are everywhere; a family name or a town would point to a passage.
    assert not {name for name in (*FAMILY_NAMES, *TOWNS) if name in titles.split()}
    asked = {passage["question"] for passage in data["passages"]}
    asked |= {question["question"] for question in data["two_hop"]}
    for kind in (PEOPLE, PLACES):
        for fact in kind.facts:
            opening, ending = fact.question.split("{name}")
            assert not [one for one in asked if one.startswith(opening) and one.endswith(ending)]

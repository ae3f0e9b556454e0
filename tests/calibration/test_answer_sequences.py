"""Sequences of calibration on answers."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from rtpurbo.calibration.answer_sequences import (
    SHARES,
    TEXT_LABELS,
    AnswerSequences,
    target_positions,
)
from rtpurbo.data.long_range import LongRangeMix
from rtpurbo.data.prompts import Conversation
from rtpurbo.data.texts import load_texts
from tests.tiny_tokenizer import tiny_tokenizer

LENGTH = 6000


@pytest.fixture(scope="module")
def sequences():
    return AnswerSequences(tiny_tokenizer(), load_texts(None, "train"), (LENGTH, LENGTH // 2))


def test_sequences_are_long_and_ask_several_questions(sequences):
    drawn = [sequences.sequence(number) for number in range(20)]
    for number, each in enumerate(drawn):
        limit = LENGTH // (1 + number % 2)
        assert 0.9 * limit < len(each) <= limit
        if each.answer_spans:
            assert each.answer_spans[-1][1] == len(each)
    questions = Counter(len(each.answer_spans) for each in drawn)
    assert max(questions) >= 4
    assert sum(questions.elements()) > 2 * len(drawn)
    assert questions[0] <= 2  # prose


def test_they_depend_on_number_and_seed_alone(sequences):
    assert sequences.sequence(3) == sequences.sequence(3)
    assert sequences.sequence(3) != sequences.sequence(5)
    other = AnswerSequences(sequences.tokenizer, sequences.corpus, sequences.lengths, seed=1)
    assert other.sequence(3) != sequences.sequence(3)


def test_tasks_that_do_not_fit_are_replaced_by_prose(sequences):
    short = AnswerSequences(sequences.tokenizer, sequences.corpus, (40,))
    for number in range(12):
        assert len(short.sequence(number)) <= 40


def test_empty_answers_are_left_out(sequences, monkeypatch):
    drawn = Conversation([1, 2, 3, 4], [(1, 3), (4, 4)])
    monkeypatch.setattr(LongRangeMix, "passage", lambda *arguments: drawn)
    passages = replace(sequences, shares={"passage": 1.0})
    assert passages.sequence(0) == Conversation([1, 2, 3, 4], [(1, 3)])


def test_shares_are_whole():
    assert sum(SHARES.values()) == pytest.approx(1)


def test_targets_are_all_answer_tokens_and_some_of_the_text():
    conversation = Conversation(list(range(1000)), [(900, 903), (990, 1000)])
    positions, answers = target_positions(conversation, "seed")
    text = positions[~answers]
    assert positions[answers].tolist() == [899, 900, 901, *range(989, 999)]
    assert len(set(text.tolist())) == len(text) == TEXT_LABELS
    assert text.max() < 899
    again, _ = target_positions(conversation, "seed")
    assert torch.equal(again, positions)
    other, _ = target_positions(conversation, "another")
    assert not torch.equal(other, positions)


def test_prose_has_targets_in_the_text_alone():
    positions, answers = target_positions(Conversation(list(range(100)), []), "seed")
    assert positions.tolist() == list(range(99))
    assert not answers.any()

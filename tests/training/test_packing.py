"""Packing of sequences, and the choice and weights of their queries."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.settings import IndexerTrainingSettings
from rtpurbo.training.packing import choose_queries, pack
from rtpurbo.training.sequences import TrainingSequence

RULE = AttentionRule(num_sink_tokens=2, sliding_window=8, block_size=8)
EVERY_ROW = IndexerTrainingSettings(queries_per_step=None, answer_weight=3.0)


def sequences(*lengths, answers=0):
    return [TrainingSequence([1] * length, answers) for length in lengths]


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [
        ((), []),
        ((5,), [(0, 1)]),
        ((40, 60, 1, 100, 30, 30), [(0, 2), (2, 3), (3, 4), (4, 6)]),
        ((200, 10, 200), [(0, 1), (1, 2), (2, 3)]),
    ],
)
def test_sequences_are_packed_up_to_the_longest(lengths, groups):
    found = [(part.start, part.stop) for part in pack(sequences(*lengths), 100)]
    assert found == groups


def test_every_query_with_far_keys_has_the_same_weight():
    choice = choose_queries(sequences(30, 4, 15), RULE, EVERY_ROW, ["a", "b", "c"], "cpu")
    assert choice.positions.tolist() == [*range(10, 30), *range(44, 49)]
    assert choice.documents.tolist() == [0] * 20 + [2] * 5
    torch.testing.assert_close(choice.weights, torch.tensor([1 / 20] * 20 + [1 / 5] * 5))
    assert torch.equal(choice.weights, choice.report_weights)


def test_queries_that_predict_an_answer_are_added():
    choice = choose_queries(sequences(20, 20, answers=4), RULE, EVERY_ROW, ["a", "b"], "cpu")
    answers = torch.isin(choice.positions, torch.tensor([15, 16, 17, 18, 35, 36, 37, 38]))
    torch.testing.assert_close(choice.weights - choice.report_weights, 3 / 4 * answers.float())
    assert choice.report_weights.sum() == pytest.approx(2)


def test_a_choice_of_queries_depends_only_on_the_seed_of_its_sequence():
    some = replace(EVERY_ROW, queries_per_step=5)
    both = choose_queries(sequences(30, 40), RULE, some, ["a", "b"], "cpu")
    alone = choose_queries(sequences(40), RULE, some, ["b"], "cpu")
    of_second = both.documents == 1
    assert torch.equal(both.positions[of_second] - 30, alone.positions)
    assert torch.equal(both.weights[of_second], alone.weights)
    assert len(alone.positions) == 5
    other = choose_queries(sequences(40), RULE, some, ["c"], "cpu")
    assert not torch.equal(other.positions, alone.positions)

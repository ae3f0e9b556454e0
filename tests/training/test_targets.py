"""Target positions of stage 2."""

import pytest
import torch

from rtpurbo.settings import DistillationSettings
from rtpurbo.training.sequences import TrainingSequence
from rtpurbo.training.teacher import choose_targets, states_at
from tests.tiny_models import tiny_model

TASK, PROSE = TrainingSequence(list(range(100)), 7), TrainingSequence(list(range(100)))
ANSWERS = list(range(92, 99))


def positions(sequence, **settings):
    found, answers = choose_targets(sequence, DistillationSettings(**settings), "seed")
    assert found.tolist() == sorted(set(found.tolist()))
    assert found.dtype == torch.int64
    assert int(found[-1]) < len(sequence.input_ids) - 1
    expected = [place in ANSWERS and bool(sequence.num_answer_tokens) for place in found.tolist()]
    assert answers.tolist() == expected
    return found.tolist()


def test_every_answer_token_and_some_of_the_text():
    found = positions(TASK, targets_per_sequence=20)
    assert len(found) == 20
    assert found[-7:] == ANSWERS
    assert found == positions(TASK, targets_per_sequence=20)
    assert positions(TASK, targets_per_sequence=3) == ANSWERS


def test_targets_can_be_answer_tokens_alone():
    assert positions(TASK, targets="answers") == ANSWERS
    # Prose has none.
    assert len(positions(PROSE, targets="answers", targets_per_sequence=20)) == 20


def test_targets_can_be_text_alone():
    assert positions(TASK, targets="text") == list(range(99))
    assert len(positions(TASK, targets="text", targets_per_sequence=20)) == 20


def test_prose_has_targets_in_all_of_it():
    assert positions(PROSE) == list(range(99))
    assert len(positions(PROSE, targets_per_sequence=20)) == 20


@pytest.mark.parametrize("places", [[3, 17, 38], [0]])
def test_states_are_those_that_give_the_models_logits(places):
    model = tiny_model()
    ids = list(range(40))
    with torch.no_grad():
        states = states_at(model, ids, torch.tensor(places))
        expected = model(torch.tensor([ids])).logits[0, places]
        torch.testing.assert_close(model.get_output_embeddings()(states), expected)

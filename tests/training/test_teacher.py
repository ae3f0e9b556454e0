"""The teacher's targets and the loss that reads them."""

import pytest
import torch

from rtpurbo.data.texts import load_texts
from rtpurbo.training.sequences import TrainingMix, TrainingSequence
from rtpurbo.training.source import SequenceSource
from rtpurbo.training.teacher import (
    TeacherCache,
    TeacherTargets,
    label_logits,
    label_positions,
    top_logits_divergence,
)
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def mix():
    return TrainingMix(tiny_tokenizer(), load_texts(None), (800,), 0.5, 0, "test")


def targets_of(logits, top):
    best = logits.log_softmax(-1).topk(top)
    count = len(logits)
    return TeacherTargets(torch.arange(count), torch.zeros(count), best.indices, best.values)


def test_positions_predict_every_answer_token():
    positions, answers = label_positions(TrainingSequence(list(range(100)), 7), 20, "seed")
    assert positions[answers].tolist() == list(range(92, 99))
    assert len(positions) == 20
    assert positions.tolist() == sorted(set(positions.tolist()))


def test_positions_of_prose_are_all_there_are():
    positions, answers = label_positions(TrainingSequence(list(range(10))), 20, "seed")
    assert positions.tolist() == list(range(9))
    assert not answers.any()


def test_the_teacher_itself_has_no_loss():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    assert top_logits_divergence(logits, targets_of(logits, 10)).abs().max() < 1e-5


def test_divergence_counts_every_other_token_as_one():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
    found = top_logits_divergence(student, targets_of(teacher, 3))
    p, q = teacher.softmax(-1), student.softmax(-1)
    for row in range(4):
        top = p[row].topk(3).indices
        rest_p, rest_q = 1 - p[row, top].sum(), 1 - q[row, top].sum()
        expected = (p[row, top] * (p[row, top] / q[row, top]).log()).sum()
        expected += rest_p * (rest_p / rest_q).log()
        assert found[row] == pytest.approx(float(expected))


def test_mass_moved_outside_the_top_tokens_costs():
    teacher = torch.tensor([[5.0, 4.0, 0.0, 0.0, 0.0]])
    moved = torch.tensor([[5.0, 4.0, 4.0, 0.0, 0.0]])
    assert top_logits_divergence(moved, targets_of(teacher, 2)) > 0.1


def test_label_logits_equal_the_models():
    model = tiny_model()
    ids = list(range(40))
    positions = torch.tensor([3, 17, 38])
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0, positions]
        torch.testing.assert_close(label_logits(model, ids, positions), expected)


def test_targets_are_computed_once(tmp_path, mix):
    cache = TeacherCache(
        tmp_path, SequenceSource(mix, mix.corpus, 1), seed=0, num_labels=32, top_logits=10
    )
    model = tiny_model(vocab_size=512, max_position_embeddings=1024)
    cache.fill(model, 1)
    sequence, before = cache.read(1)
    cache.fill(None, 1)
    assert torch.equal(before.token_ids, cache.read(1)[1].token_ids)
    assert sequence == mix.sequence(1)
    logits = label_logits(model, sequence.input_ids, before.positions)
    assert top_logits_divergence(logits, before).abs().max() < 1e-4
    assert int(before.answers.sum()) == sequence.num_answer_tokens > 0

"""The teacher's targets and the loss that reads them."""

import pytest
import torch

from rtpurbo.data.texts import load_texts
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import DistillationSettings
from rtpurbo.training.sequences import TrainingMix
from rtpurbo.training.source import SequenceSource
from rtpurbo.training.teacher import (
    TeacherCache,
    TeacherTargets,
    states_at,
    teacher_targets,
    top_logits_divergence,
)
from rtpurbo.training.vocabulary import log_probabilities
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

SETTINGS = DistillationSettings(targets_per_sequence=32)


@pytest.fixture
def mix():
    return TrainingMix(tiny_tokenizer(), load_texts(None), (800,), {"needles": 0.5}, 0, "test")


@pytest.fixture
def model():
    return tiny_model(vocab_size=512, max_position_embeddings=1024)


def targets_of(logits, top):
    best = logits.log_softmax(-1).topk(top)
    count = len(logits)
    return TeacherTargets(torch.arange(count), torch.zeros(count), best.indices, best.values)


def divergence(logits, targets):
    return top_logits_divergence(logits.log_softmax(-1).gather(-1, targets.token_ids), targets)


def test_the_teacher_itself_has_no_loss():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    assert divergence(logits, targets_of(logits, 10)).abs().max() < 1e-5


def test_divergence_counts_every_other_token_as_one():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 4, 9, generator=generator, dtype=torch.float64)
    found = divergence(student, targets_of(teacher, 3))
    p, q = teacher.softmax(-1), student.softmax(-1)
    for row in range(4):
        top = p[row].topk(3).indices
        rest_p, rest_q = 1 - p[row, top].sum(), 1 - q[row, top].sum()
        expected = (p[row, top] * (p[row, top] / q[row, top]).log()).sum()
        expected += rest_p * (rest_p / rest_q).log()
        assert found[row] == pytest.approx(float(expected))


def test_mass_moved_outside_the_top_tokens_is_penalised():
    teacher = torch.tensor([[5.0, 4.0, 0.0, 0.0, 0.0]])
    moved = torch.tensor([[5.0, 4.0, 4.0, 0.0, 0.0]])
    assert divergence(moved, targets_of(teacher, 2)) > 0.1


def test_targets_are_the_models_most_likely_tokens(mix, model):
    sequence = mix.sequence(1)
    found = teacher_targets(model, sequence, SETTINGS, "seed")
    with torch.no_grad():
        logits = model(torch.tensor([sequence.input_ids])).logits[0, found.positions]
    expected = targets_of(logits, SETTINGS.top_logits)
    assert torch.equal(found.token_ids, expected.token_ids)
    torch.testing.assert_close(found.log_probabilities, expected.log_probabilities)


def test_targets_are_computed_once(tmp_path, mix, model):
    cache = TeacherCache(tmp_path, SequenceSource(mix, mix.corpus, 1), SETTINGS, seed=0)
    cache.fill(model, 1)
    sequence, before = cache.read(1)
    cache.fill(None, 1)
    for again in (cache, TeacherCache(tmp_path, cache.source, SETTINGS, seed=0)):
        again.fill(None, 1)
        found, targets = again.read(1)
        assert found == sequence == mix.sequence(1)
        for name, value in vars(before).items():
            assert torch.equal(getattr(targets, name), value)
    states = states_at(model, sequence.input_ids, before.positions)
    student = log_probabilities(states, model.get_output_embeddings(), before.token_ids)
    assert top_logits_divergence(student, before).abs().max() < 1e-4
    assert int(before.answers.sum()) == sequence.num_answer_tokens > 0


def test_another_number_of_processes_computes_what_is_missing(tmp_path, mix, model, monkeypatch):
    computed = []

    def watched(teacher, sequence, *others):
        computed.append(sequence)
        return teacher_targets(teacher, sequence, *others)

    monkeypatch.setattr("rtpurbo.training.teacher.teacher_targets", watched)
    first = SequenceSource(mix, mix.corpus, 2)
    first._lanes = range(0, 2, 2)  # as the first of two processes has them
    cache = TeacherCache(tmp_path, first, SETTINGS, seed=0)
    cache.fill(model, 0)
    alone = TeacherCache(tmp_path, SequenceSource(mix, mix.corpus, 2), SETTINGS, seed=0)
    alone.fill(model, 0)
    assert computed == [mix.sequence(0), mix.sequence(1)]
    assert alone.read(0)[0] == mix.sequence(0)
    assert alone.read(1)[0] == mix.sequence(1)


def test_a_full_disk_leaves_no_partial_file(tmp_path, mix, model, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    cache = TeacherCache(tmp_path, SequenceSource(mix, mix.corpus, 1), SETTINGS, seed=0)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(RTPurboError, match="no space left"):
        cache.fill(model, 0)
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    cache.fill(model, 0)
    assert cache.read(0)[0] == mix.sequence(0)


@pytest.mark.parametrize("content", [b"", b"not tensors at all"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, mix, content):
    (tmp_path / "sequence-000000.safetensors").write_bytes(content)
    cache = TeacherCache(tmp_path, SequenceSource(mix, mix.corpus, 1), SETTINGS, seed=0)
    with pytest.raises(
        RTPurboError, match=r"sequence-000000\.safetensors cannot be read: remove it"
    ):
        cache.read(0)

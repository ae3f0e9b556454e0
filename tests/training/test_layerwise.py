"""Layer-wise training: the same losses and gradients as from kept states."""

import weakref
from dataclasses import replace

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.models.sparse_layers import headwise_modules, indexer_weights
from rtpurbo.ops.eager import visibility
from rtpurbo.settings import IndexerTrainingSettings
from rtpurbo.training import layerwise
from rtpurbo.training.capture import capture_heads, run_backbone
from rtpurbo.training.layerwise import train_layer_by_layer
from rtpurbo.training.probe import FIGURES, Probe, queries_with_far_keys
from rtpurbo.training.sequences import TrainingSequence
from tests.ops.triton.support import DEVICE
from tests.tiny_models import make_sparse, sparse_config, tiny_model, with_own_keys
from tests.training.test_probe import indexer_loss

pytestmark = pytest.mark.kernels

SETTINGS = IndexerTrainingSettings(queries_per_step=None, lengths=(200,), answer_weight=2.0)


def sparse(family="llama", **options):
    model = tiny_model(family)
    return trainable(make_sparse(model, sparse_config(model, **options)))


def trainable(model):
    for module in headwise_modules(model):
        if module.retrieval_heads:
            module.indexer.requires_grad_(True)
    return model


def sequences(*lengths, answers=0):
    generator = torch.Generator().manual_seed(0)
    return [
        TrainingSequence(torch.randint(2, 64, (length,), generator=generator).tolist(), answers)
        for length in lengths
    ]


def train(model, given, settings=SETTINGS, **options):
    """Losses and gradients."""
    seeds = [f"seed-{len(sequence.input_ids)}" for sequence in given]
    losses = train_layer_by_layer(model, given, settings, seeds, **options)
    return torch.stack(losses), take_gradients(model)


def take_gradients(model):
    gradients = []
    for module in headwise_modules(model):
        if module.retrieval_heads:
            for weight in module.indexer.parameters():
                gradients.append(weight.grad)
                weight.grad = None
    return gradients


def added(first, second):
    return [one + other for one, other in zip(first, second, strict=True)]


@pytest.mark.parametrize(
    "options",
    [{"reading": "paper"}, {"reading": "residual"}, {"heads": (0, 1, 2, 3), "shared_keys": True}],
    ids=str,
)
def test_gradients_equal_those_of_kept_states(options):
    model = sparse(**options)
    [sequence] = given = sequences(60, answers=3)
    losses, gradients = train(model, given)
    rule: AttentionRule = model.rtpurbo_config.attention
    heads = capture_heads(model, sequence.input_ids)
    rows = queries_with_far_keys(heads[0].positions[0], rule)
    loss = sum(indexer_loss(seen, rows, rule).sum() for seen in heads)
    answers = sum(indexer_loss(seen, torch.arange(56, 59), rule).sum() for seen in heads)
    (loss + SETTINGS.answer_weight * answers).backward()
    torch.testing.assert_close(gradients, take_gradients(model), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        losses, (loss / (2 * len(heads[0].names))).detach()[None], atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_the_gradient_of_a_shared_key_is_the_sum_over_its_heads(backend):
    """The heads of one KV head come first, then one head alone."""
    model = sparse(heads=(0, 1, 4), shared_keys=True).to(DEVICE)
    own, given = trainable(with_own_keys(model)), sequences(50, 37, answers=2)
    losses, gradients = train(model, given, backend=backend)
    expected_losses, expected = train(own, given, backend=backend)
    for layer in (0, 1):
        keys = expected[2 * layer + 1]
        expected[2 * layer + 1] = torch.stack([keys[0] + keys[1], keys[2]])
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)


# Gemma's own windowed layers are masked by transformers, which knows packed documents by positions.
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "smollm3", "phi3"])
def test_packed_sequences_have_the_same_gradients_as_single_ones(family):
    model = sparse(family)
    given = sequences(50, 12, 37, answers=2)
    together, gradients = train(model, given)
    parts = [train(model, [sequence]) for sequence in given]
    torch.testing.assert_close(together, torch.cat([loss for loss, _ in parts]))
    expected = parts[0][1]
    for _, part in parts[1:]:
        expected = added(expected, part)
    torch.testing.assert_close(gradients, expected, atol=1e-5, rtol=1e-4)


def test_the_choice_of_queries_does_not_depend_on_packing():
    model, some = sparse(), replace(SETTINGS, queries_per_step=6)
    given = sequences(50, 37)
    together, _ = train(model, given, some)
    apart, _ = train(model, given, replace(some, lengths=(50,)))
    torch.testing.assert_close(together, apart)
    assert not torch.allclose(together, train(model, given)[0])


def test_kernels_compute_the_same_gradients():
    model, given = sparse().to(DEVICE), sequences(70, 30, answers=2)
    expected, gradients = train(model, given, backend="eager")
    losses, found = train(model, given, backend="triton")
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, gradients, atol=1e-4, rtol=1e-3)


def test_chunks_of_queries_compute_the_same_gradients(monkeypatch):
    model, given = sparse(), sequences(60, answers=2)
    expected = train(model, given)
    walked = []

    monkeypatch.setattr(visibility, "MAX_CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(layerwise, "query_chunks", lambda *sizes: _fresh(walked, *sizes))
    torch.testing.assert_close(train(model, given), expected, atol=1e-5, rtol=1e-4)
    assert len(walked) > 8


def _fresh(walked, *sizes):
    chunks = list(visibility.query_chunks(*sizes))
    walked.extend(chunks)
    return chunks


def test_the_student_trains_on_its_own_states_one_sequence_at_a_time():
    model = sparse(prefill_mode="top_p", top_p=0.5)
    given = sequences(60, 45)
    losses, _ = train(model, given, on_student=True)
    apart = torch.cat([train(model, [sequence], on_student=True)[0] for sequence in given])
    torch.testing.assert_close(losses, apart)
    assert not torch.allclose(losses, train(model, given)[0])


def test_states_are_freed_after_their_layer_and_no_logits_are_computed():
    model = sparse()
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("logits were computed"))
    weights = indexer_weights(model)
    kept = []

    def meet(seen):
        assert all(reference() is None for reference in kept)
        kept.extend(weakref.ref(states) for states in (seen.queries, seen.key_features))

    run_backbone(model, [sequence.input_ids for sequence in sequences(30, 20)], meet)
    assert len(kept) == 4
    train(model, sequences(40))
    after = indexer_weights(model)
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())
    assert all(module.document_lengths is None for module in headwise_modules(model))


def test_positions_restart_in_each_document():
    model, found = sparse(), []
    run_backbone(model, [[5] * 4, [6] * 3], found.append)
    assert [seen.positions.tolist() for seen in found] == [[[0, 1, 2, 3, 0, 1, 2]]] * 2
    assert found[0].starts.tolist() == [0, 0, 0, 0, 4, 4, 4]
    assert found[0].num_documents == 2


def test_a_probe_measures_the_same_with_kept_states_and_without():
    model = sparse()
    given = sequences(60, 45, answers=3)
    kept, passing = (Probe(model, given, keep=keep).measure() for keep in (True, False))
    assert set(kept["by_head"]) == {"0.1", "0.4", "1.1", "1.4"}
    assert kept["answer_recall"] == pytest.approx(passing["answer_recall"])
    for name in FIGURES:
        assert kept[name] == pytest.approx(passing[name])
    assert "answer_recall" not in Probe(model, sequences(60)).measure()


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_sequences_on_a_gpu(dtype, head_dim):
    model = tiny_model("qwen3", head_dim=head_dim, max_position_embeddings=4096).to("cuda", dtype)
    make_sparse(model, sparse_config(model))
    for module in headwise_modules(model):
        for weight in module.indexer.float().requires_grad_(True).parameters():
            weight.data *= 0.1  # larger scores would make much of a rounded index state
    given, settings = sequences(700, 130, 1000, answers=3), replace(SETTINGS, lengths=(2000,))
    together, gradients = train(model, given, settings)
    for options in ({"backend": "eager"}, {"packed": False}):
        losses, expected = train(model, given, settings, **options)
        torch.testing.assert_close(together, losses, atol=1e-2, rtol=2e-2)
        for found, other in zip(gradients, expected, strict=True):
            assert (found - other).norm() < 0.05 * other.norm()

"""Both stages of training on decoder types of different kinds."""

import pytest
import torch

from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import runtime
from rtpurbo.settings import DistillationSettings, IndexerTrainingSettings
from rtpurbo.training.layerwise import train_layer_by_layer
from rtpurbo.training.sequences import TrainingSequence
from rtpurbo.training.stage2 import backpropagate
from rtpurbo.training.student import trainable, trained_weights
from rtpurbo.training.teacher import teacher_targets
from tests.models.zoo.configurations import EQUAL
from tests.models.zoo.test_zoo import FAST
from tests.tiny_models import any_model, make_sparse, sparse_config

STAGE1 = IndexerTrainingSettings(queries_per_step=None, lengths=(200,))
STAGE2 = DistillationSettings(targets_per_sequence=30, lora_rank=2, top_logits=5, decode_queries=8)


def sparse(name):
    model_type, changes = EQUAL[name]
    model = any_model(model_type, **changes)
    heads = sorted({1, model.config.num_attention_heads // 2})
    return make_sparse(model, sparse_config(model, heads, prefill_mode="dense"))


def sequences():
    generator = torch.Generator().manual_seed(0)
    return [
        TrainingSequence(torch.randint(2, 64, (length,), generator=generator).tolist(), 7)
        for length in (70, 55)
    ]


@pytest.mark.parametrize("name", FAST)
def test_indexers_learn_the_same_from_packed_documents_as_from_single_ones(name):
    model, losses, gradients = sparse(name), [], []
    weights = [weight for layer in headwise_modules(model) for weight in layer.indexer.parameters()]
    for weight in weights:
        weight.data *= 0.1
        weight.requires_grad_(True)
    for packed in (True, False):
        given = train_layer_by_layer(model, sequences(), STAGE1, ["a", "b"], packed=packed)
        losses.append(torch.stack(given))
        gradients.append([weight.grad.clone() for weight in weights])
        for weight in weights:
            weight.grad = None
    assert losses[0].isfinite().all()
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients[0])
    for first, second in zip(*gradients, strict=True):
        assert first.isfinite().all()
        torch.testing.assert_close(first, second, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", FAST)
def test_a_lora_approaches_the_dense_model(name):
    model, sequence, losses = sparse(name), sequences()[0], []
    with runtime(model).dense():
        targets = teacher_targets(model, sequence, STAGE2, "seed")
    with trainable(model, STAGE2, 0) as student:
        weights = trained_weights(student)
        assert weights
        optimizer = torch.optim.Adam(weights.values(), lr=3e-3)
        for step in range(12):
            losses.append(float(backpropagate(model, step, sequence, targets, STAGE2).loss))
            assert all(
                weight.grad is None or weight.grad.isfinite().all() for weight in weights.values()
            )
            optimizer.step()
            optimizer.zero_grad()
    assert min(losses[-3:]) < 0.9 * losses[0]

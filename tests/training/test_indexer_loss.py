"""The loss of stage 1: a forward KL over visible keys."""

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.training.capture import capture_heads, merge_heads
from rtpurbo.training.indexer_loss import (
    forward_divergence,
    indexer_loss,
    rows_with_far_keys,
    selection_quality,
)
from tests.tiny_models import make_sparse, sparse_config, tiny_model

RULE = AttentionRule(num_sink_tokens=2, sliding_window=8, min_tokens=0, block_size=8, top_p=0.9)


@pytest.fixture(scope="module", params=[False, True], ids=["own keys", "shared keys"])
def captured(request):
    model = tiny_model()
    make_sparse(model, sparse_config(model, (0, 1, 4), shared_keys=request.param))
    ids = torch.randint(0, 64, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    return capture_heads(model, ids)


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 1, 3, 5, 7, generator=generator, dtype=torch.float64)
    visible = torch.rand(1, 1, 5, 7, generator=generator) > 0.3
    visible[..., 0] = True
    return teacher, student.requires_grad_(), visible


def test_divergence_equals_the_textbook_sum(logits):
    teacher, student, visible = logits
    p = teacher.masked_fill(~visible, -torch.inf).softmax(-1)
    q = student.masked_fill(~visible, -torch.inf).softmax(-1)
    expected = torch.where(visible, p * (p / q).log(), 0.0).nansum(-1)
    torch.testing.assert_close(forward_divergence(teacher, student, visible), expected)


def test_divergence_is_zero_only_between_equals(logits):
    teacher, student, visible = logits
    assert forward_divergence(teacher, teacher + 3, visible).abs().max() < 1e-12
    assert (forward_divergence(teacher, student, visible) > 0).all()


def test_gradient_is_student_minus_teacher(logits):
    teacher, student, visible = logits
    forward_divergence(teacher, student, visible).sum().backward()
    p, q = (part.masked_fill(~visible, -torch.inf).softmax(-1) for part in (teacher, student))
    torch.testing.assert_close(student.grad, (q - p).detach())


def test_gradient_by_finite_differences(logits):
    teacher, student, visible = logits
    assert torch.autograd.gradcheck(lambda s: forward_divergence(teacher, s, visible), (student,))


def test_only_rows_with_far_keys_teach(captured):
    rows = rows_with_far_keys(captured[0], RULE)
    assert rows.tolist() == list(range(10, 60))


@pytest.mark.parametrize("reading", ["paper", "residual", "far"])
def test_merged_heads_lose_and_learn_the_same(captured, reading):
    rule = AttentionRule(num_sink_tokens=2, sliding_window=8, block_size=8, reading=reading)
    rows = rows_with_far_keys(captured[0], rule)
    weights = [weight for seen in captured for weight in seen.query_weights + seen.key_weights]

    def loss_and_gradients(parts):
        for weight in weights:
            weight.requires_grad_(True).grad = None
        losses = torch.cat([indexer_loss(seen, rows, rule) for seen in parts])
        losses.sum().backward()
        return losses.detach(), [weight.grad for weight in weights]

    torch.testing.assert_close(
        loss_and_gradients(captured), loss_and_gradients(merge_heads(captured))
    )


def test_quality_of_exact_scores_is_the_oracles(captured, monkeypatch):
    seen = captured[0]
    monkeypatch.setattr(type(seen), "index_scores", type(seen).logits)
    quality = selection_quality(seen, rows_with_far_keys(seen, RULE), RULE)
    assert torch.equal(quality.tokens, quality.oracle_tokens)
    assert (quality.recall >= RULE.top_p).all()
    assert quality.divergence.abs().max() < 1e-5

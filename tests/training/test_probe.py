"""The loss of stage 1: a forward KL over visible keys."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.config import AttentionRule, HeadMap, RTPurboConfig
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.ops.eager.attend import attention_logits
from rtpurbo.ops.eager.divergence import forward_divergence
from rtpurbo.ops.packed import indexer_divergence
from rtpurbo.training.capture import capture_heads
from rtpurbo.training.probe import (
    queries_with_far_keys,
    query_logits,
    selection_quality,
)
from tests.tiny_models import RETRIEVAL_HEADS, any_model, make_sparse, sparse_config, tiny_model

RULE = AttentionRule(num_sink_tokens=2, sliding_window=8, min_tokens=0, block_size=8, top_p=0.9)


def indexer_loss(seen, query_positions, rule):
    """Forward KL between each head's attention and its indexer's, mean over queries: [heads]."""
    exact, estimate, near, far = query_logits(seen, query_positions, rule)
    return forward_divergence(exact, estimate, near | far).mean(-1)[0]


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


def test_divergence_is_zero_only_for_equal_distributions(logits):
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


def test_only_queries_with_far_keys_contribute(captured):
    rows = queries_with_far_keys(captured[0].positions[0], RULE)
    assert rows.tolist() == list(range(10, 60))


def test_steps_need_only_their_own_queries_of_a_sequence():
    model = make_sparse(tiny_model(), sparse_config(tiny_model()))
    ids = torch.randint(0, 64, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    kept = torch.tensor([12, 31, 44, 59])
    rows = torch.tensor([31, 59])
    for some, every in zip(
        capture_heads(model, ids, query_positions=kept), capture_heads(model, ids), strict=True
    ):
        assert some.queries.shape[2] == some.query_features.shape[2] == 4
        torch.testing.assert_close(some.logits(rows), every.logits(rows))
        torch.testing.assert_close(some.index_scores(rows), every.index_scores(rows))
        assert torch.equal(indexer_loss(some, rows, RULE), indexer_loss(every, rows, RULE))


def test_chunks_of_queries_measure_the_same(captured, monkeypatch):
    rows = queries_with_far_keys(captured[0].positions[0], RULE)
    whole = selection_quality(captured[0], rows, RULE)
    # Seven queries of two heads at a time.
    monkeypatch.setattr("rtpurbo.ops.eager.visibility.MAX_CHUNK_ELEMENTS", 7 * 2 * 60)
    chunked = selection_quality(captured[0], rows, RULE)
    for name, values in whole.items():
        torch.testing.assert_close(chunked[name], values)


def test_quality_of_exact_scores_is_that_of_the_oracle(captured, monkeypatch):
    seen = captured[0]
    monkeypatch.setattr(type(seen), "index_scores", type(seen).logits)
    quality = selection_quality(seen, queries_with_far_keys(seen.positions[0], RULE), RULE)
    assert torch.equal(quality["tokens"], quality["oracle_tokens"])
    assert (quality["recall"] >= RULE.top_p).all()
    assert quality["divergence"].abs().max() < 1e-5


@pytest.mark.parametrize("heads", [(0, 1, 2, 3), (0, 1, 3), (2,)])
def test_heads_share_the_keys_of_their_group(heads):
    """One copy of the keys gives the scores of keys that are repeated for every head."""
    model = tiny_model(num_attention_heads=4, num_key_value_heads=2)
    make_sparse(model, RTPurboConfig(HeadMap((heads, (1,)), 4, 2), RULE))
    ids = torch.randint(0, 64, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    by_layer = capture_heads(model, ids)
    assert [seen.keys.shape[1] for seen in by_layer] == [len({head // 2 for head in heads}), 1]
    rows = torch.tensor([20, 39])
    for seen in by_layer:
        readers, key_weight = seen.key_value_heads, seen.key_weight
        logits = attention_logits(seen.queries_of(rows), seen.keys[:, readers], seen.scaling)
        index_keys = seen.key_features[0, readers] @ key_weight.transpose(-1, -2)
        torch.testing.assert_close(seen.logits(rows), logits)
        torch.testing.assert_close(seen.index_keys(), index_keys)


def test_learned_sinks_take_part_in_teacher_and_student():
    model = any_model("gpt_oss", layer_types=["full_attention"] * 2, num_local_experts=4)
    make_sparse(model, sparse_config(model))
    for module in headwise_modules(model):
        module.indexer.query_weight.data *= 0.02
        module.module.sinks.data += 20.0  # logits of these weights are as large
    ids = torch.randint(0, 64, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = torch.tensor([20, 41, 59])
    for layer, seen in enumerate(capture_heads(model, ids)):
        sinks = model.model.layers[layer].self_attn.sinks[list(RETRIEVAL_HEADS)]
        exact, scores = (
            torch.cat([sinks[None, :, None, None].expand(1, -1, 3, 1), logits], -1)
            for logits in (seen.logits(rows), seen.index_scores(rows))
        )
        keys = torch.arange(-1, 60)
        visible = keys <= rows[:, None]
        near = (keys < 2) | (keys > rows[:, None] - 8)
        teacher, student = (
            logits.masked_fill(~visible, -torch.inf).log_softmax(-1)
            for logits in (exact, torch.where(near, exact, scores))
        )
        expected = torch.where(visible, teacher.exp() * (teacher - student), 0.0).sum(-1)
        loss = indexer_loss(seen, rows, RULE)
        torch.testing.assert_close(loss, expected.mean(-1)[0], rtol=1e-4, atol=1e-5)
        in_chunks = indexer_divergence(
            seen.queries_of(rows)[0], seen.keys[0], seen.key_value_heads,
            seen.index_queries(rows), seen.index_keys(), rows, seen.starts, RULE,
            scaling=seen.scaling, sinks=seen.sinks,
        )  # fmt: skip
        torch.testing.assert_close(in_chunks.mean(-1), loss)
        without = indexer_loss(replace(seen, sinks=None), rows, RULE)
        assert not torch.allclose(without, loss)
        quality = selection_quality(seen, rows, RULE)
        assert (quality["recall"] <= 1).all()
        assert quality["recall"].isfinite().all()

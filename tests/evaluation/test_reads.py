"""What is measured of reading, by loops over its definition and on models that generate."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.evaluation import reads
from rtpurbo.evaluation.reads import ReadMeter, Reads, metering
from rtpurbo.models.sparsify import empty_head_map, set_rule, set_selector, sparsify
from tests.evaluation.policies.support import every_row, random_rows
from tests.models.test_decoding import gpu_model
from tests.tiny_models import (
    RETRIEVAL_HEADS,
    make_sparse,
    padded_batch,
    sparse_config,
    sparse_model,
    tiny_model,
)

LAYERS, WINDOW, SINKS = 2, 8, 2
STOP = 63


def nothing(rows):
    return torch.zeros_like(rows.logits, dtype=torch.bool)


def answers(model, ids, mask, new=4, **options):
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0, **options
    )


def measure(model, head_map, ids, mask, **options):
    with metering(model, head_map, [0, STOP]) as meter:
        answers(model, ids, mask, **options)
    return meter.reads()


@pytest.fixture
def prompt():
    ids, mask = padded_batch()
    return ids.clamp(max=STOP - 1), mask


@pytest.mark.parametrize(("q_len", "stride"), [(1, 1), (31, 1), (31, 5)])
def test_tokens_and_mass_of_every_row(q_len, stride):
    rows = random_rows(q_len, 111)
    selected = (torch.rand(rows.logits.shape) < 0.3) & rows.far
    meter = ReadMeter(needs_rows=True, row_stride=stride)
    meter.add_rows(rows, selected)

    tokens, kept, far, far_read = [], [], [], []
    for batch, head, row in every_row(rows):
        if rows.query_positions[batch, row] < 0 or row % stride:
            continue
        near, away = rows.near[batch, 0, row], rows.far[batch, 0, row]
        read = near | selected[batch, head, row]
        logits = rows.logits[batch, head, row].exp()
        tokens.append(int(read.sum()))
        kept.append(float(logits[read].sum() / logits[near | away].sum()))
        if away.any():
            far.append(int(away.sum()))
            far_read.append(int(selected[batch, head, row].sum()))
    measured = meter.reads()
    assert measured.rows == len(tokens)
    assert measured.tokens_mean == pytest.approx(sum(tokens) / len(tokens))
    assert sum(count <= measured.tokens_p50 for count in tokens) >= len(tokens) / 2
    assert sum(count < measured.tokens_p50 for count in tokens) <= len(tokens) / 2
    assert sum(count <= measured.tokens_p95 for count in tokens) >= 0.95 * len(tokens)
    assert measured.mass_kept == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    assert measured.far_rows == len(far)
    assert measured.far_tokens_mean == pytest.approx(sum(far_read) / len(far))
    assert measured.far_share == pytest.approx(sum(far_read) / sum(far))
    bins = [sum(count.bit_length() == size for count in far_read) for size in range(8)]
    assert measured.far_histogram == tuple(bins[: len(measured.far_histogram)])
    assert sum(measured.far_histogram) == len(far)


def test_nothing_measured_is_nothing_known():
    assert ReadMeter().reads() == Reads()
    assert Reads().far_share is None


def test_a_dense_model_reads_everything(prompt):
    model = tiny_model()
    head_map = sparse_config(model).head_map
    ids, mask = prompt
    measured = measure(model, head_map, ids, mask, min_new_tokens=4, suppress_tokens=[0, STOP])
    # Three steps: the first new token is the prompt's.
    counts = sorted(int(length) + step for length in mask.sum(1) for step in (1, 2, 3))
    heads = LAYERS * len(RETRIEVAL_HEADS)
    assert measured.rows == len(counts) * heads
    assert measured.tokens_mean == pytest.approx(sum(counts) / len(counts))
    assert measured.tokens_p95 == counts[-1]
    assert measured.mass_kept == measured.far_share == 1


def test_a_sparse_model_reads_more_and_keeps_more_with_a_higher_p(prompt):
    model = sparse_model(prefill_mode="dense")
    options = {"min_new_tokens": 4, "suppress_tokens": [0, STOP]}
    low = measure(model, model.rtpurbo_config.head_map, *prompt, **options)
    set_rule(model, top_p=0.9)
    high = measure(model, model.rtpurbo_config.head_map, *prompt, **options)
    assert low.rows == high.rows == 3 * 3 * LAYERS * len(RETRIEVAL_HEADS)
    assert WINDOW + SINKS < low.tokens_mean < high.tokens_mean
    assert 0 < low.mass_kept < high.mass_kept < 1
    set_rule(model, top_p=1.0)
    everything = measure(model, model.rtpurbo_config.head_map, *prompt, **options)
    assert everything.mass_kept == pytest.approx(1)
    assert everything.far_share == 1


def test_heads_that_have_become_local_are_measured_all_the_same(prompt):
    # With the prompt local too, windows alone and a selection of nothing are one model.
    model = sparse_model()
    head_map = model.rtpurbo_config.head_map
    set_selector(model, nothing)
    options = {"min_new_tokens": 4, "suppress_tokens": [0, STOP]}
    expected = measure(model, head_map, *prompt, **options)
    sparsify(model, replace(model.rtpurbo_config, head_map=empty_head_map(model)))
    measured = measure(model, head_map, *prompt, **options)
    assert measured.tokens_mean == measured.tokens_p95 == WINDOW + SINKS
    assert measured.mass_kept == pytest.approx(expected.mass_kept)
    assert measured.mass_kept < 1
    assert replace(measured, mass_kept=0) == replace(expected, mass_kept=0)
    assert measured.far_share == 0


def test_prompts_without_a_cache_count_row_by_row(monkeypatch):
    monkeypatch.setattr(reads, "ROW_STRIDE", 1)
    ids, mask = padded_batch((0,))
    expected = sum(min(place + 1, WINDOW + SINKS) for place in range(ids.shape[1])) / ids.shape[1]
    model = make_sparse(tiny_model(), sparse_config(tiny_model(), prefill_mode="top_p"))
    head_map = model.rtpurbo_config.head_map
    set_selector(model, nothing)
    for _ in range(2):
        with metering(model, head_map, [0]) as meter:
            model(ids, attention_mask=mask, use_cache=False)
            model(ids, attention_mask=mask)  # a prompt
        assert meter.reads().tokens_mean == pytest.approx(expected)
        assert meter.reads().rows == ids.shape[1] * LAYERS * len(RETRIEVAL_HEADS)
        sparsify(model, replace(model.rtpurbo_config, head_map=empty_head_map(model)))
    dense = tiny_model()
    with metering(dense, head_map, [0]) as meter:
        dense(ids, use_cache=False)
        dense(ids)
    assert meter.reads().tokens_mean == (ids.shape[1] + 1) / 2


def test_sequences_that_have_ended_do_not_count(prompt):
    ids, mask = prompt
    model = sparse_model(prefill_mode="dense")
    head_map = model.rtpurbo_config.head_map
    with metering(model, head_map, [0, STOP]) as meter:
        cache = model(ids, attention_mask=mask).past_key_values
        for tokens in ([5, STOP, 5], [5, 0, 5], [STOP, 0, 0]):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            model(torch.tensor(tokens)[:, None], attention_mask=mask, past_key_values=cache)
    assert meter.reads().rows == 4 * LAYERS * len(RETRIEVAL_HEADS)


def test_steps_between_are_not_measured(monkeypatch, prompt):
    monkeypatch.setattr(reads, "_step_stride", lambda device: 3)
    model = sparse_model(prefill_mode="dense")
    head_map = model.rtpurbo_config.head_map
    options = {"suppress_tokens": [0, STOP]}
    with metering(model, head_map, [0, STOP]) as meter:
        for new in (6, 2):  # five steps, of which the first and the fourth count; then one
            answers(model, *prompt, new=new, min_new_tokens=new, **options)
    assert meter.reads().rows == (2 + 1) * 3 * LAYERS * len(RETRIEVAL_HEADS)


@pytest.mark.gpu
def test_kernels_and_measured_steps_take_turns():
    model = gpu_model(max_position_embeddings=1024)
    ids = torch.randint(2, STOP, (2, 300), device="cuda")
    backends = []
    module = model.base_model.layers[0].self_attn
    module.register_forward_hook(lambda *_: backends.append(module.used_backend))
    with metering(model, model.rtpurbo_config.head_map, [0, STOP]) as meter:
        answers(
            model, ids, torch.ones_like(ids), new=10, min_new_tokens=10, suppress_tokens=[0, STOP]
        )
    measured = meter.reads()
    assert backends[1:] == ["eager" if step % 4 == 0 else "triton" for step in range(9)]
    assert measured.rows == 3 * 2 * LAYERS * len(RETRIEVAL_HEADS)
    assert 32 < measured.tokens_mean < 310
    assert 0 < measured.mass_kept <= 1 + 1e-3


def test_everything_is_taken_off_afterwards(prompt):
    model = sparse_model()
    head_map = model.rtpurbo_config.head_map
    before = len(model.base_model._forward_pre_hooks)
    measure(model, head_map, *prompt)
    assert len(model.base_model._forward_pre_hooks) == before
    assert model.base_model.layers[0].self_attn.statistics is None

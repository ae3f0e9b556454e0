"""Measured reads, compared with loops over their definition and on models that generate."""

import warnings
from dataclasses import replace

import pytest
import torch

from rtpurbo.evaluation import reads
from rtpurbo.evaluation.reads import ReadMeter, Reads, metering, step_counts
from rtpurbo.models import decoding
from rtpurbo.models.graphs import CudaGraph
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import empty_head_map, set_selector, sparsify
from tests.evaluation.policies.support import every_query, random_queries
from tests.models.test_decoding import BATCHES, PROMPT, gpu_model, plain_steps  # noqa: F401
from tests.models.test_generation import WINDOW as ROOMY
from tests.models.test_generation import greedy_by_recomputation
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
def test_tokens_and_mass_of_every_query(q_len, stride):
    rows = random_queries(q_len, 111)
    selected = (torch.rand(rows.logits.shape) < 0.3) & rows.far
    meter = ReadMeter(needs_queries=True, query_stride=stride)
    meter.add_queries(rows, selected)

    tokens, kept, far, far_read = [], [], [], []
    for batch, head, row in every_query(rows):
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
    assert measured.queries == len(tokens)
    assert measured.tokens_mean == pytest.approx(sum(tokens) / len(tokens))
    assert sum(count <= measured.tokens_p50 for count in tokens) >= len(tokens) / 2
    assert sum(count < measured.tokens_p50 for count in tokens) <= len(tokens) / 2
    assert sum(count <= measured.tokens_p95 for count in tokens) >= 0.95 * len(tokens)
    assert measured.recall == pytest.approx(sum(kept) / len(kept), rel=1e-5)
    assert measured.far_queries == len(far)
    assert measured.far_tokens_mean == pytest.approx(sum(far_read) / len(far))
    assert measured.far_share == pytest.approx(sum(far_read) / sum(far))
    bins = [sum(count.bit_length() == size for count in far_read) for size in range(8)]
    assert measured.far_histogram == tuple(bins[: len(measured.far_histogram)])
    assert sum(measured.far_histogram) == len(far)


def test_no_figures_without_measured_queries():
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
    assert measured.queries == len(counts) * heads
    assert measured.tokens_mean == pytest.approx(sum(counts) / len(counts))
    assert measured.tokens_p95 == counts[-1]
    assert measured.recall == measured.far_share == 1


def test_a_higher_p_reads_more_tokens_and_raises_recall(prompt):
    model = sparse_model(prefill_mode="dense")
    options = {"min_new_tokens": 4, "suppress_tokens": [0, STOP]}
    low = measure(model, model.rtpurbo_config.head_map, *prompt, **options)
    model.rtpurbo.set_rule(top_p=0.9)
    high = measure(model, model.rtpurbo_config.head_map, *prompt, **options)
    assert low.queries == high.queries == 3 * 3 * LAYERS * len(RETRIEVAL_HEADS)
    assert WINDOW + SINKS < low.tokens_mean < high.tokens_mean
    assert 0 < low.recall < high.recall < 1
    model.rtpurbo.set_rule(top_p=1.0)
    everything = measure(model, model.rtpurbo_config.head_map, *prompt, **options)
    assert everything.recall == pytest.approx(1)
    assert everything.far_share == 1


def test_heads_that_became_local_are_measured(prompt):
    # With the prompt local too, windows alone and a selection of nothing are one model.
    model = sparse_model()
    head_map = model.rtpurbo_config.head_map
    set_selector(model, nothing)
    options = {"min_new_tokens": 4, "suppress_tokens": [0, STOP]}
    expected = measure(model, head_map, *prompt, **options)
    sparsify(model, replace(model.rtpurbo_config, head_map=empty_head_map(model)))
    measured = measure(model, head_map, *prompt, **options)
    assert measured.tokens_mean == measured.tokens_p95 == WINDOW + SINKS
    assert measured.recall == pytest.approx(expected.recall)
    assert measured.recall < 1
    assert replace(measured, recall=0) == replace(expected, recall=0)
    assert measured.far_share == 0


def test_prompts_without_a_cache_count_row_by_row(monkeypatch):
    monkeypatch.setattr(reads, "QUERY_STRIDE", 1)
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
        assert meter.reads().queries == ids.shape[1] * LAYERS * len(RETRIEVAL_HEADS)
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
    assert meter.reads().queries == 4 * LAYERS * len(RETRIEVAL_HEADS)


def test_steps_between_are_not_measured(monkeypatch, prompt):
    monkeypatch.setattr(reads, "step_counts", lambda step, device: step % 3 == 0)
    model = sparse_model(prefill_mode="dense")
    head_map = model.rtpurbo_config.head_map
    options = {"suppress_tokens": [0, STOP]}
    with metering(model, head_map, [0, STOP]) as meter:
        for new in (6, 2):  # five steps, of which the first and the fourth count; then one
            answers(model, *prompt, new=new, min_new_tokens=new, **options)
    assert meter.reads().queries == (2 + 1) * 3 * LAYERS * len(RETRIEVAL_HEADS)


def test_on_a_gpu_the_first_steps_of_an_answer_are_enough():
    counted = [step for step in range(500) if step_counts(step, torch.device("cuda"))]
    assert counted == [0, 4, 8, 12, 16, 20, 24, 28]
    assert all(step_counts(step, torch.device("cpu")) for step in range(500))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(
        reads, "step_counts", lambda step, _: step_counts(step, torch.device("cuda"))
    )
    monkeypatch.setattr(reads, "any_step_counts_from", lambda step, _: step < reads.STEPS_WATCHED)


def record_steps(model, monkeypatch, graph_class):
    """A list to which every layer that measures adds its number, and every replay adds "replayed"."""
    events = []

    class Recorded(graph_class):
        def __call__(self):
            assert all(module.statistics is None for module in headwise_modules(model))
            events.append("replayed")
            return super().__call__()

    def add_queries(meter, rows, selected):
        events.append(rows.query_positions.max().item())
        return measured_as_ever(meter, rows, selected)

    measured_as_ever = ReadMeter.add_queries
    monkeypatch.setattr(ReadMeter, "add_queries", add_queries)
    monkeypatch.setattr(decoding.GraphedDecoder, "graph_class", Recorded)
    return events


def expected_steps(first, count, layers):
    """Steps that `record_steps` records of an answer, which begins at position `first`."""
    for step in range(count):
        if step_counts(step, torch.device("cuda")):
            yield from [first + step] * layers
        else:
            yield "replayed"


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("batch", BATCHES)
def test_steps_that_are_not_measured_are_replayed(
    plain_steps, as_on_a_gpu, monkeypatch, family, batch  # noqa: F811
):  # fmt: skip
    model, (ids, mask) = sparse_model(family), padded_batch(BATCHES[batch], PROMPT)
    expected, _ = greedy_by_recomputation(model, ids, mask, 60)
    events = record_steps(model, monkeypatch, plain_steps)
    layers = sum(bool(module.retrieval_heads) for module in headwise_modules(model))
    with (
        warnings.catch_warnings(),
        metering(model, model.rtpurbo_config.head_map, [0]) as meter,
    ):
        warnings.filterwarnings("error", message="decoding runs without")
        for number in (1, 2):
            assert torch.equal(answers(model, ids, mask, new=60), expected)
            assert plain_steps.prepared == number  # a cache each, captured once
    assert events == 2 * list(expected_steps(PROMPT, 59, layers))
    still_writing = (expected[:, PROMPT:-1][:, :32:4] != 0).sum()
    assert meter.reads().queries == 2 * still_writing * layers * len(RETRIEVAL_HEADS)


def test_local_steps_are_replayed_after_the_last_that_is_measured(
    plain_steps, as_on_a_gpu, monkeypatch  # noqa: F811
):  # fmt: skip
    model, (ids, mask) = sparse_model(), padded_batch((5, 0), PROMPT)
    head_map = model.rtpurbo_config.head_map
    sparsify(model, replace(model.rtpurbo_config, head_map=empty_head_map(model)))
    expected, _ = greedy_by_recomputation(model, ids, mask, 60)
    events = record_steps(model, monkeypatch, plain_steps)
    with metering(model, head_map, [0]):
        for _ in range(2):
            assert torch.equal(answers(model, ids, mask, new=60), expected)
    measured = [step for step in expected_steps(PROMPT, 32, LAYERS) if step != "replayed"]
    assert events == 2 * [*measured, *27 * ["replayed"]]
    assert all(module.observer is None for module in headwise_modules(model))


def test_a_measured_step_can_enlarge_a_full_cache(
    plain_steps, as_on_a_gpu, monkeypatch  # noqa: F811
):  # fmt: skip
    # Captured at the second step with room for three: the fifth is measured, and makes room.
    monkeypatch.setattr(decoding, "roomy_capacity", lambda tokens, expected: tokens + 2)
    model, (ids, mask) = sparse_model(**ROOMY), padded_batch((5, 0), PROMPT)
    expected, _ = greedy_by_recomputation(model, ids, mask, 60)
    events = record_steps(model, monkeypatch, plain_steps)
    with metering(model, model.rtpurbo_config.head_map, [0]):
        assert torch.equal(answers(model, ids, mask, new=60), expected)
    assert plain_steps.prepared == 2
    assert events == list(expected_steps(PROMPT, 59, LAYERS))


def test_prose_between_answers_is_measured(plain_steps, as_on_a_gpu):  # noqa: F811
    """Call of the base model alone, without its head."""
    model, (ids, mask) = sparse_model(prefill_mode="top_p"), padded_batch((0,))
    head_map = model.rtpurbo_config.head_map
    with metering(model, head_map, [0]) as meter, torch.no_grad():
        for _ in range(2):
            answers(model, ids, mask, new=40)
            rows = meter.reads().queries
            model.base_model(ids, use_cache=False)
            prose = -(-ids.shape[1] // reads.QUERY_STRIDE) * LAYERS * len(RETRIEVAL_HEADS)
            assert meter.reads().queries == rows + prose
    assert plain_steps.prepared == 2


def test_a_failed_forward_ends_the_measurement(prompt):
    model = sparse_model(prefill_mode="dense")
    with metering(model, model.rtpurbo_config.head_map, [0, STOP]) as meter:
        with pytest.raises(IndexError):
            model(prompt[0] + 1000)
        model.base_model(prompt[0], use_cache=False)
        assert meter.needs_queries


@pytest.mark.gpu
def test_graphs_and_measured_steps_take_turns(monkeypatch):
    model = gpu_model(max_position_embeddings=1024)
    ids = torch.randint(2, STOP, (2, 300), device="cuda")
    events = record_steps(model, monkeypatch, CudaGraph)
    options = {"new": 60, "min_new_tokens": 60, "suppress_tokens": [0, STOP]}
    with metering(model, model.rtpurbo_config.head_map, [0, STOP]) as meter:
        result = answers(model, ids, torch.ones_like(ids), return_dict_in_generate=True, **options)
    assert result.past_key_values.is_static
    assert events == list(expected_steps(300, 59, LAYERS))
    measured = meter.reads()
    assert measured.queries == 8 * 2 * LAYERS * len(RETRIEVAL_HEADS)
    assert 32 < measured.tokens_mean < 360
    assert 0 < measured.recall <= 1 + 1e-3


@pytest.mark.gpu
def test_kernels_and_measured_steps_take_turns():
    model = gpu_model(max_position_embeddings=1024)
    ids = torch.randint(2, STOP, (2, 300), device="cuda")
    backends = []
    layer = headwise_modules(model)[0]
    module = model.base_model.layers[0].self_attn
    module.register_forward_hook(lambda *_: backends.append(layer.used_backend))
    with metering(model, model.rtpurbo_config.head_map, [0, STOP]) as meter:
        answers(
            model, ids, torch.ones_like(ids), new=10, min_new_tokens=10, suppress_tokens=[0, STOP]
        )
    measured = meter.reads()
    assert backends[1:] == ["eager" if step % 4 == 0 else "triton" for step in range(9)]
    assert measured.queries == 3 * 2 * LAYERS * len(RETRIEVAL_HEADS)
    assert 32 < measured.tokens_mean < 310
    assert 0 < measured.recall <= 1 + 1e-3


def hooks_of(model):
    return [
        list(hooks)
        for module in (model, model.base_model)
        for hooks in (module._forward_pre_hooks, module._forward_hooks)
    ]


def test_hooks_are_removed_afterwards(prompt):
    model = sparse_model()
    head_map = model.rtpurbo_config.head_map
    before = hooks_of(model)
    measure(model, head_map, *prompt)
    assert hooks_of(model) == before
    assert headwise_modules(model)[0].statistics is None


@pytest.mark.parametrize("heads", [RETRIEVAL_HEADS, ()])
def test_layers_report_again_to_what_they_reported_to_before(prompt, heads):
    model, seen = sparse_model(heads=heads), []
    head_map = sparse_model().rtpurbo_config.head_map
    with model.rtpurbo.counting() as counts, model.rtpurbo.observed(seen.append, dense=False):
        assert measure(model, head_map, *prompt).queries
        for module in headwise_modules(model):
            assert module.statistics is counts
            assert module.observer == seen.append

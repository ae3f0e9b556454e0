"""The public operators refuse what does not fit and never fall back silently."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.ops import (
    HeadLayout,
    SelectionStatistics,
    api,
    causal_attention,
    headwise_attention,
    local_attention,
    retrieval_attention,
)
from tests.oracles import random_problem

RULE = AttentionRule(sliding_window=16, min_tokens=0, block_size=8, prefill_mode="top_p")
CALLS = {
    "local_attention": lambda problem, **options: local_attention(
        problem.queries,
        problem.query_positions,
        problem.states(),
        problem.kv_head_index,
        sliding_window=16,
        num_sink_tokens=4,
        scaling=problem.scaling,
        **options,
    ),
    "causal_attention": lambda problem, **options: causal_attention(
        problem.queries,
        problem.query_positions,
        problem.states(),
        problem.kv_head_index,
        scaling=problem.scaling,
        **options,
    ),
    "retrieval_attention": lambda problem, **options: retrieval_attention(
        problem.queries,
        problem.query_positions,
        problem.states(),
        problem.kv_head_index,
        problem.index_queries,
        RULE,
        scaling=problem.scaling,
        **options,
    ),
    "headwise_attention": lambda problem, **options: headwise_attention(
        *problem.layered(
            HeadLayout.build([0], 4, 2), RULE.num_selecting_queries(problem.queries.shape[2])
        ),
        RULE,
        scaling=problem.scaling,
        **options,
    ),
}


@pytest.fixture
def problem():
    return random_problem(3, 20)


@pytest.mark.parametrize("operator", CALLS)
def test_outputs_have_the_shape_of_queries(operator, problem):
    output, log_sum_exp = CALLS[operator](problem, return_log_sum_exp=True)
    assert output.shape == problem.queries.shape
    assert log_sum_exp.shape == problem.queries.shape[:3]


def test_auto_is_eager_on_a_cpu(problem):
    call = CALLS["headwise_attention"]
    actual = call(problem, return_log_sum_exp=True)
    expected = call(problem, return_log_sum_exp=True, backend="eager")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_an_unknown_backend_is_refused(problem):
    with pytest.raises(ValueError, match="backend 'cuda9' is unknown"):
        CALLS["headwise_attention"](problem, backend="cuda9")


@pytest.mark.parametrize("operator", CALLS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: replace(p, query_positions=p.query_positions[:, 1:]), "query_positions"),
        (lambda p: replace(p, key_positions=p.key_positions[:, 1:]), "key positions"),
        (lambda p: replace(p, keys=p.keys[..., 1:]), "head_dim must be equal"),
        (lambda p: replace(p, keys=p.keys.repeat(2, 1, 1, 1)), "batch and head_dim"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(operator, spoil, message, problem):
    with pytest.raises(ValueError, match=message):
        CALLS[operator](spoil(problem))


@pytest.mark.parametrize(
    "watched",
    [
        {"selector": lambda rows: rows.far.expand(rows.logits.shape)},
        {"statistics": SelectionStatistics(needs_queries=True)},
    ],
    ids=["selector", "statistics"],
)
def test_calls_without_kernels_run_eagerly_or_are_rejected(watched, problem):
    layout = HeadLayout.build([0, 1, 2, 3], 4, 2)
    rule = AttentionRule(sliding_window=8, block_size=8, prefill_mode="top_p")

    def call(backend, num_selecting=3):
        return api.headwise_attention(
            *problem.layered(layout, num_selecting),
            rule,
            scaling=problem.scaling,
            backend=backend,
            **watched,
        )

    torch.testing.assert_close(call("auto"), call("eager"), rtol=0, atol=0)
    for kernels in ("triton", "flex"):
        with pytest.raises(ValueError, match="choose backend 'eager' for a selector"):
            call(kernels)
    call("auto", 0)  # no row selects


@pytest.mark.parametrize("operator", ["headwise_attention", "indexer_divergence"])
def test_the_specification_offers_every_operator(operator):
    assert callable(api.implementation(operator, "eager"))


@pytest.mark.parametrize("backend", api.BACKENDS)
def test_every_backend_offers_a_whole_layer(backend):
    assert callable(api.implementation("headwise_attention", backend))


def test_an_operator_that_a_backend_lacks_is_refused():
    with pytest.raises(ValueError, match="backend 'flex' has no operator 'indexer_divergence'"):
        api.implementation("indexer_divergence", "flex")


@pytest.mark.parametrize("setting", [None, "", "0", "false", "off"])
def test_kernels_need_a_gpu_without_the_interpreter(monkeypatch, setting):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if setting is not None:
        monkeypatch.setenv("TRITON_INTERPRET", setting)
    assert not api.interprets_kernels()
    with pytest.raises(ValueError, match="'triton' needs a GPU"):
        api.require_triton(torch.empty(1))


@pytest.mark.parametrize("setting", ["1", "true", "on"])
def test_the_interpreter_runs_kernels_on_a_cpu(monkeypatch, setting):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", setting)
    assert api.interprets_kernels()
    api.require_triton(torch.empty(1))

"""A whole layer through kernels equals the fp64 oracle under the same rule."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout, SelectionStatistics, headwise_attention
from tests import oracles
from tests.ops.triton.support import (
    DTYPES,
    assert_as_exact_as_eager,
    kernel_problem,
    on_cpu,
    slotted,
)

pytestmark = pytest.mark.kernels

RULE = AttentionRule(
    num_sink_tokens=2, min_tokens=0, sliding_window=40, block_size=16, query_block_size=32
)


def run(problem, rule, retrieval_heads, padding, **options):
    heads, key_value_heads = problem.queries.shape[1], problem.keys.shape[1]
    layout = HeadLayout.build(retrieval_heads, heads, key_value_heads, problem.queries.device)
    selecting = rule.num_selecting_queries(problem.queries.shape[2])
    arguments = list(problem.layered(layout, selecting))
    arguments[2], arguments[3] = (slotted(states, padding) for states in arguments[2:4])
    return headwise_attention(
        *arguments, rule, scaling=problem.scaling, backend="triton", **options
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("retrieval_heads", [(), (0,), (1, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize(
    ("q_len", "k_len", "padding"), [(111, 111, (0,)), (40, 130, (0, 17))], ids=str
)
def test_dense_retrieval_heads_equal_the_oracle(dtype, retrieval_heads, q_len, k_len, padding):
    problem = kernel_problem(q_len, k_len, dtype, padding=padding)
    mask = oracles.headwise_keys(on_cpu(problem), RULE, retrieval_heads)
    output, log_sum_exp = run(problem, RULE, retrieval_heads, padding, return_log_sum_exp=True)
    assert_as_exact_as_eager(problem, mask, output, log_sum_exp)
    output, log_sum_exp = run(problem, RULE, retrieval_heads, padding)
    assert log_sum_exp is None
    assert_as_exact_as_eager(problem, mask, output)


@pytest.mark.parametrize("retrieval_heads", [(), (0,), (0, 1)], ids=str)
@pytest.mark.parametrize("padding", [(0,), (0, 17)], ids=str)
@pytest.mark.parametrize("queries", [slice(80, 105), slice(80, 111), slice(1, 111)], ids=str)
def test_dense_queries_of_local_heads_equal_the_oracle(retrieval_heads, padding, queries):
    problem = kernel_problem(111, 111, DTYPES[0], padding=padding)
    mask = oracles.headwise_keys(on_cpu(problem), RULE, retrieval_heads)
    mask[:, :, queries] = oracles.visible_keys(on_cpu(problem))[:, :, queries]
    options = {"dense_queries": queries}
    found = run(problem, RULE, retrieval_heads, padding, return_log_sum_exp=True, **options)
    assert_as_exact_as_eager(problem, mask, *found)
    output, _ = run(problem, RULE, retrieval_heads, padding, **options)
    assert_as_exact_as_eager(problem, mask, output)


def test_sparse_prefill_equals_eager_and_counts_as_it_does():
    rule = replace(RULE, prefill_mode="row_peak", row_share=0.05, retrieval_window=20)
    problem = kernel_problem(100, 190, torch.float32, padding=(0, 31), index_dim=4)
    layout = HeadLayout.build((0, 3), 4, 2, problem.queries.device)
    counted, expected_counts = SelectionStatistics(), SelectionStatistics()
    output, _ = run(problem, rule, (0, 3), (0, 31), statistics=counted)
    expected, _ = headwise_attention(
        *problem.layered(layout, 100),
        rule,
        scaling=problem.scaling,
        statistics=expected_counts,
        backend="eager",
    )
    torch.testing.assert_close(output, expected)
    assert counted == expected_counts
    assert 0 < counted.share_read < 1


@pytest.mark.parametrize(
    ("changes", "padding", "reason"),
    [
        ({"prefill_mode": "top_p"}, (0,), "only 'row_peak' has"),
        (
            {"prefill_mode": "row_peak", "reading": "paper"},
            (0,),
            "reading 'paper' has no block selection",
        ),
        ({"prefill_mode": "row_peak", "block_size": 24}, (0,), "powers of two"),
        ({"prefill_mode": "row_peak", "row_stride": 4}, (0,), "fewer than 16 queries"),
        ({}, None, "order of the keys is unknown"),
    ],
    ids=str,
)
def test_unsupported_calls_are_rejected_with_a_reason(changes, padding, reason):
    problem = kernel_problem(20, 60, DTYPES[0])
    rule = replace(RULE, **changes)
    layout = HeadLayout.build((0,), 4, 2, problem.queries.device)
    arguments = list(problem.layered(layout, rule.num_selecting_queries(20)))
    if padding is not None:
        arguments[2], arguments[3] = (slotted(states, padding) for states in arguments[2:4])
    with pytest.raises(ValueError, match=reason):
        headwise_attention(*arguments, rule, scaling=problem.scaling, backend="triton")

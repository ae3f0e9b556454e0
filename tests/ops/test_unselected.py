"""Unselected far keys as block means equal the fp64 oracle."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.errors import RTPurboError
from rtpurbo.ops import causal_attention
from rtpurbo.ops.eager.unselected import block_value_means
from tests import oracles
from tests.ops import retrieval_support
from tests.ops.retrieval_support import run
from tests.oracles import random_problem

RULE = replace(retrieval_support.RULE, unselected="block_means")


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 1), (1, 63), (63, 63), (1, 129), (31, 111)])
@pytest.mark.parametrize(
    "changes",
    [{}, {"reading": "far"}, {"granularity": "block"}, {"num_sink_tokens": 0}, {"min_tokens": 0}],
    ids=str,
)
def test_equals_the_oracle(changes, q_len, k_len):
    rule = replace(RULE, **changes)
    problem = random_problem(q_len, k_len, padding=(0, k_len // 4))
    mask = oracles.retrieval_keys(problem, rule)
    expected = oracles.attend_with_block_means(problem, mask, rule)
    # Index scores are computed in single precision.
    torch.testing.assert_close(run(problem, rule), expected, rtol=1e-4, atol=1e-6)
    if k_len > 100:
        assert (oracles.visible_keys(problem) & ~mask).any()


def test_order_of_the_keys_does_not_matter():
    problem = random_problem(20, 90, padding=(0, 13))
    shuffled = problem.key_order(torch.randperm(90, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(run(shuffled, RULE), run(problem, RULE))


def test_equals_dense_attention_if_blocks_have_one_value_and_the_index_is_exact():
    problem = random_problem(40, 120, index_dim=8)
    group = problem.queries.shape[1] // problem.keys.shape[1]
    blocks = problem.key_positions[0] // RULE.block_size
    problem = replace(
        problem,
        values=problem.values[:, :, blocks * RULE.block_size],
        index_queries=problem.queries * problem.scaling,
        index_keys=problem.keys.repeat_interleave(group, 1),
    )
    dense = causal_attention(
        problem.queries,
        problem.query_positions,
        problem.states(),
        problem.kv_head_index,
        scaling=problem.scaling,
        return_log_sum_exp=True,
    )
    # Index scores are computed in single precision.
    torch.testing.assert_close(run(problem, RULE), dense, rtol=1e-4, atol=1e-5)
    dropped = run(problem, replace(RULE, unselected="dropped"))
    assert (dropped[0] - dense[0]).abs().max() > 0.01


@pytest.mark.parametrize("mode", ["row_share", "row_peak"])
def test_block_lists_drop_the_unselected_keys(mode):
    problem, rule = random_problem(40, 120), replace(RULE, prefill_mode=mode)
    torch.testing.assert_close(
        run(problem, rule), run(problem, replace(rule, unselected="dropped"))
    )


def test_a_selector_drops_the_unselected_keys():
    problem = random_problem(1, 60)

    def nothing(queries):
        return torch.zeros_like(queries.far).expand(-1, 4, -1, -1)

    dropped = run(problem, replace(RULE, unselected="dropped"), selector=nothing)
    torch.testing.assert_close(run(problem, RULE, selector=nothing), dropped)


def test_dense_retrieval_heads_leave_nothing_to_block_means(monkeypatch):
    problem, dense = random_problem(20, 90), replace(RULE, top_p=1.0)
    expected = run(problem, replace(dense, unselected="dropped"))
    monkeypatch.delattr("rtpurbo.ops.eager.retrieval.block_value_means")
    torch.testing.assert_close(run(problem, dense), expected)


def test_gradients_reach_values_and_near_keys():
    problem = random_problem(3, 80)
    for name in ("queries", "keys", "values"):
        getattr(problem, name).requires_grad_()

    def function(queries, keys, values):
        return run(replace(problem, queries=queries, keys=keys, values=values), RULE)[0]

    assert torch.autograd.gradcheck(
        lambda values: function(problem.queries, problem.keys, values), (problem.values,)
    )
    function(problem.queries, problem.keys, problem.values).sum().backward()
    assert problem.queries.grad.isfinite().all()
    assert problem.keys.grad.abs().sum() > 0


def test_means_of_half_precision_are_summed_in_single_precision():
    problem = random_problem(1, 70, padding=(0, 5))
    states = problem.to(torch.bfloat16).states()
    found = block_value_means(states, 64, 2)
    assert found.dtype == torch.bfloat16
    values = states.values[1, 0, 5:69].float().mean(0)
    torch.testing.assert_close(found[1, 0, 0], values.bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reading": "paper"}, "reading 'paper' estimates no masses"),
        ({"retrieval_window": 4}, "retrieval_window is 4, but with unselected 'block_means'"),
        ({"unselected": "mean"}, "unselected"),
    ],
    ids=str,
)
def test_rules_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(RTPurboError, match=message):
        replace(RULE, **changes)

"""Local and dense heads equal the fp64 oracle."""

import pytest
import torch

from rtpurbo.ops import causal_attention, local_attention
from rtpurbo.ops.eager import visibility
from tests import oracles
from tests.oracles import random_problem

SHAPES = [(1, 1), (1, 63), (63, 63), (1, 129), (63, 111), (111, 129), (129, 129)]


def run(operator, problem, with_log_sum_exp=True, **options):
    return operator(
        problem.queries,
        problem.query_positions,
        problem.states(),
        problem.kv_head_index,
        scaling=problem.scaling,
        return_log_sum_exp=with_log_sum_exp,
        **options,
    )


def check(operator, problem, mask, **options):
    expected, expected_log_sum_exp = oracles.attend(problem, mask)
    output, log_sum_exp = run(operator, problem, **options)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(log_sum_exp, expected_log_sum_exp)
    output, log_sum_exp = run(operator, problem, with_log_sum_exp=False, **options)
    torch.testing.assert_close(output, expected)
    assert log_sum_exp is None


@pytest.mark.parametrize(("q_len", "k_len"), SHAPES)
@pytest.mark.parametrize("windows", [1, 16, [1, 16, 40, 500]])
@pytest.mark.parametrize("sinks", [0, 4])
def test_local_attention_equals_the_oracle(q_len, k_len, windows, sinks):
    problem = random_problem(q_len, k_len, padding=(0, k_len // 3))
    given = windows if isinstance(windows, int) else torch.tensor(windows)
    mask = oracles.near_keys(problem, windows, sinks)
    check(local_attention, problem, mask, sliding_window=given, num_sink_tokens=sinks)


@pytest.mark.parametrize("padding", [(0,), (350, 7), (390, 400)])
def test_local_attention_over_several_chunks_reads_only_keys_in_reach(padding):
    problem = random_problem(390, 400, padding=padding, heads=2, key_value_heads=1, head_dim=4)
    mask = oracles.near_keys(problem, 8, 2)
    check(local_attention, problem, mask, sliding_window=8, num_sink_tokens=2)


def test_local_attention_takes_keys_in_any_order():
    problem = random_problem(20, 63, padding=(0, 11))
    order = torch.randperm(63, generator=torch.Generator().manual_seed(0))
    shuffled = problem.key_order(order)
    mask = oracles.near_keys(shuffled, 9, 2)
    check(local_attention, shuffled, mask, sliding_window=9, num_sink_tokens=2)
    options = {"sliding_window": 9, "num_sink_tokens": 2}
    torch.testing.assert_close(
        run(local_attention, shuffled, **options), run(local_attention, problem, **options)
    )


def test_a_window_over_everything_is_dense():
    problem = random_problem(63, 111, padding=(0, 20))
    local = run(local_attention, problem, sliding_window=111, num_sink_tokens=0)
    torch.testing.assert_close(local, run(causal_attention, problem))


@pytest.mark.parametrize(("q_len", "k_len"), SHAPES)
@pytest.mark.parametrize("padded", [False, True])
def test_causal_attention_equals_the_oracle(q_len, k_len, padded):
    problem = random_problem(q_len, k_len, padding=(0, k_len // 3) if padded else (0, 0))
    check(causal_attention, problem, oracles.visible_keys(problem))


@pytest.mark.parametrize(("q_len", "k_len"), SHAPES)
def test_causal_attention_of_keys_in_order_equals_the_oracle(q_len, k_len):
    problem = random_problem(q_len, k_len)
    expected, _ = oracles.attend(problem, oracles.visible_keys(problem))
    states = problem.states()
    states.in_order = True
    output, _ = causal_attention(
        problem.queries,
        problem.query_positions,
        states,
        problem.kv_head_index,
        scaling=problem.scaling,
    )
    torch.testing.assert_close(output, expected)


def test_causal_attention_in_chunks_equals_unchunked(monkeypatch):
    problem = random_problem(63, 111, padding=(0, 30))
    whole = run(causal_attention, problem)
    monkeypatch.setattr(visibility, "MAX_CHUNK_ELEMENTS", 7 * 2 * 4 * 111)
    torch.testing.assert_close(run(causal_attention, problem), whole)


@pytest.mark.parametrize(("heads", "key_value_heads"), [(1, 1), (6, 3), (8, 1)])
def test_any_ratio_of_query_to_key_value_heads(heads, key_value_heads):
    problem = random_problem(9, 33, heads=heads, key_value_heads=key_value_heads)
    check(causal_attention, problem, oracles.visible_keys(problem))
    mask = oracles.near_keys(problem, 5, 1)
    check(local_attention, problem, mask, sliding_window=5, num_sink_tokens=1)

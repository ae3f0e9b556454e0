"""Local heads read every key for the last queries of a prompt."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout, headwise_attention
from tests import oracles
from tests.oracles import random_problem

RULE = AttentionRule(
    num_sink_tokens=2, min_tokens=2, sliding_window=9, block_size=8, query_block_size=16, top_p=0.7
)
DENSE_RULE = replace(RULE, sliding_window=50)
DENSE = slice(10, 17)
SINKS = torch.tensor([0.5, -1.0, 2.0, 1.0], dtype=torch.float64)


def run(problem, retrieval_heads, num_decode_queries=0, **options):
    layout = HeadLayout.build(retrieval_heads, 4, problem.keys.shape[1])
    selecting = RULE.num_selecting_queries(problem.queries.shape[2], num_decode_queries)
    return headwise_attention(
        *problem.layered(layout, selecting),
        RULE,
        scaling=problem.scaling,
        dense_queries=DENSE,
        **options,
    )


def keys_read(problem, retrieval_heads, num_decode_queries=0):
    """Mask of the oracle, with every visible key for the dense queries of local heads."""
    mask = oracles.headwise_keys(problem, RULE, retrieval_heads, num_decode_queries)
    dense = oracles.headwise_keys(problem, DENSE_RULE, retrieval_heads, num_decode_queries)
    assert (mask[:, :, DENSE] != dense[:, :, DENSE]).any()
    mask[:, :, DENSE] = dense[:, :, DENSE]
    return mask


@pytest.mark.parametrize("retrieval_heads", [(), (0,), (0, 1), (0, 3)], ids=str)
@pytest.mark.parametrize("num_decode_queries", [0, 3])
def test_equals_the_oracle(retrieval_heads, num_decode_queries):
    problem = random_problem(20, 50, padding=(0, 17))
    expected = oracles.attend(problem, keys_read(problem, retrieval_heads, num_decode_queries))
    actual = run(problem, retrieval_heads, num_decode_queries, return_log_sum_exp=True)
    torch.testing.assert_close(actual, expected)
    output, log_sum_exp = run(problem, retrieval_heads, num_decode_queries)
    torch.testing.assert_close(output, expected[0])
    assert log_sum_exp is None


def test_learned_sinks_are_in_the_denominator():
    problem = random_problem(20, 50)
    without = oracles.attend(problem, keys_read(problem, (0,)))
    share = torch.sigmoid(without[1] - SINKS[:, None])
    output, log_sum_exp = run(problem, (0,), sinks=SINKS, return_log_sum_exp=True)
    torch.testing.assert_close(output, without[0] * share[..., None])
    torch.testing.assert_close(log_sum_exp, torch.logaddexp(without[1], SINKS[:, None]))


def test_gradients_are_those_of_attention_over_the_same_keys():
    problem = random_problem(20, 50, padding=(0, 25))
    leaves = [problem.queries, problem.keys, problem.values]
    mask = keys_read(problem, (0, 3))
    for leaf in leaves:
        leaf.requires_grad_()
    weights = torch.randn(problem.queries.shape, generator=torch.Generator().manual_seed(0))

    def gradients(output):
        return torch.autograd.grad((output * weights).sum(), leaves)

    actual = gradients(run(problem, (0, 3))[0])
    torch.testing.assert_close(actual, gradients(oracles.attend(problem, mask)[0]))

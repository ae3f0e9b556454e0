"""Learned sinks: one more logit in every softmax, and in the mass that selection counts."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout, headwise_attention
from tests import oracles
from tests.oracles import random_problem

RULE = AttentionRule(
    num_sink_tokens=2, min_tokens=0, sliding_window=9, block_size=8, query_block_size=16, top_p=0.7
)
RETRIEVAL_HEADS = (0, 3)
SINKS = torch.tensor([0.5, -1.0, 2.0, 1.0], dtype=torch.float64)


def attend_with_sinks(problem, mask, sinks):
    """Softmax over the keys of the mask and one logit more: output and log-sum-exp."""
    logits = oracles.exact_logits(problem).masked_fill(~mask, -torch.inf)
    column = sinks.double()[None, :, None, None].expand(*logits.shape[:-1], 1)
    logits = torch.cat([logits, column], -1)
    values = problem.values.double()[:, problem.kv_head_index]
    return logits.softmax(-1)[..., :-1] @ values, logits.logsumexp(-1)


def run(problem, rule, sinks, **options):
    layout = HeadLayout.build(RETRIEVAL_HEADS, 4, problem.keys.shape[1])
    selecting = rule.num_selecting_queries(problem.queries.shape[2])
    return headwise_attention(
        *problem.layered(layout, selecting), rule, scaling=problem.scaling, sinks=sinks, **options
    )


@pytest.mark.parametrize("q_len", [1, 30, 63])
def test_sinks_take_their_share_of_every_softmax(q_len):
    rule = replace(RULE, top_p=1.0)
    problem = random_problem(q_len, 63)
    mask = oracles.headwise_keys(problem, rule, RETRIEVAL_HEADS)
    expected = attend_with_sinks(problem, mask, SINKS)
    torch.testing.assert_close(run(problem, rule, SINKS, return_log_sum_exp=True), expected)
    output, log_sum_exp = run(problem, rule, SINKS)
    torch.testing.assert_close(output, expected[0])
    assert log_sum_exp is None


@pytest.mark.parametrize("mode", ["top_p", "row_share", "row_peak"])
@pytest.mark.parametrize("reading", ["residual", "far"])
def test_a_sink_that_holds_all_the_mass_leaves_nothing_to_select(mode, reading):
    rule = replace(RULE, prefill_mode=mode, reading=reading, far_floor=0.1)
    problem = random_problem(63, 63)
    sinks = torch.full((4,), 30.0, dtype=torch.float64)
    near = oracles.near_keys(problem, rule.near_window, rule.num_sink_tokens)
    local = oracles.near_keys(problem, rule.sliding_window, rule.num_sink_tokens)
    mask = local.expand(1, 4, 63, 63).clone()
    mask[:, list(RETRIEVAL_HEADS)] = near.expand_as(mask)[:, list(RETRIEVAL_HEADS)]
    output, _ = run(problem, rule, sinks)
    expected, _ = attend_with_sinks(problem, mask, sinks)
    torch.testing.assert_close(output / output.abs().max(), expected / output.abs().max())
    selected, _ = run(problem, rule, torch.full_like(sinks, -50.0))
    assert not torch.allclose(selected, attend_with_sinks(problem, mask, sinks - 80)[0])


def test_gradients_flow_to_sinks():
    problem, sinks = random_problem(63, 63), SINKS.clone().requires_grad_()
    run(problem, RULE, sinks)[0].square().sum().backward()
    assert sinks.grad.isfinite().all()
    assert sinks.grad.all()

"""Learned sinks through kernels: what they attend to, and what they select."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout, headwise_attention
from tests.ops.test_sinks import attend_with_sinks
from tests.ops.triton.decode_support import Step
from tests.ops.triton.support import DEVICE, kernel_problem

pytestmark = pytest.mark.kernels

RULE = AttentionRule(
    num_sink_tokens=2, min_tokens=0, sliding_window=20, block_size=16, query_block_size=32
)
SINKS = torch.tensor([0.5, -1.0, 2.0, 1.0])


@pytest.mark.parametrize("top_p", [0.7, 1.0])
@pytest.mark.parametrize("padding", [(0,), (0, 17)])
def test_a_decoding_step_attends_with_sinks(top_p, padding):
    step = Step.build(120, replace(RULE, top_p=top_p), dtype=torch.float32, padding=padding)
    output, log_sum_exp, selection = step.run(return_log_sum_exp=True, sinks=SINKS.to(DEVICE))
    expected = attend_with_sinks(step.problem, step.seen(selection), SINKS)
    torch.testing.assert_close(output.cpu().double(), expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_sum_exp.cpu().double(), expected[1], rtol=1e-4, atol=1e-5)


def test_a_decoding_step_counts_the_mass_of_sinks_as_near():
    step = Step.build(120, replace(RULE, top_p=0.7), dtype=torch.float32)
    few, many = (
        step.selected(step.run(sinks=torch.full((4,), logit, device=DEVICE))[2]).sum()
        for logit in (20.0, -20.0)
    )
    assert few == 0 < many


@pytest.mark.parametrize("mode", ["dense", "row_peak"])
def test_prefill_equals_eager(mode):
    rule = replace(RULE, prefill_mode=mode, row_share=0.05)
    problem = kernel_problem(64, 160, torch.float32, index_dim=4)
    layout = HeadLayout.build((0, 3), 4, 2, DEVICE)
    arguments = list(problem.layered(layout, rule.num_selecting_queries(64)))
    first_slots = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    arguments[2:4] = (replace(states, first_slots=first_slots) for states in arguments[2:4])
    results = [
        headwise_attention(
            *arguments, rule, scaling=problem.scaling, sinks=SINKS.to(DEVICE), backend=backend,
            return_log_sum_exp=True,
        )
        for backend in ("triton", "eager")
    ]  # fmt: skip
    torch.testing.assert_close(*results)


def test_reading_paper_is_refused():
    step = Step.build(60, replace(RULE, reading="paper"), dtype=torch.float32)
    queries, full, windowed, layout, index_queries = step.arguments
    with pytest.raises(ValueError, match="learned sinks"):
        headwise_attention(
            queries, full.positions[:, -1:], full, windowed, layout, index_queries, step.rule,
            scaling=step.problem.scaling, sinks=SINKS.to(DEVICE), backend="triton",
        )  # fmt: skip

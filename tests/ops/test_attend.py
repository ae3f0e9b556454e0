"""Softmax over an explicit mask equals the fp64 oracle, with and without the log-sum-exp."""

import pytest
import torch

from rtpurbo.ops.eager.attend import attend, attend_to_logits, attention_logits
from tests import oracles
from tests.oracles import random_problem

MASKED = random_problem(37, 63, padding=(0, 30), seed=1)


def run(problem, mask, with_log_sum_exp):
    return attend(
        problem.queries,
        problem.keys[:, problem.kv_head_index],
        problem.values[:, problem.kv_head_index],
        mask,
        problem.scaling,
        with_log_sum_exp,
    )


@pytest.mark.parametrize("with_log_sum_exp", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)],
)
def test_equals_the_oracle(dtype, tolerance, with_log_sum_exp):
    problem = MASKED.to(dtype)
    mask = torch.rand(2, 4, 37, 63, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[0, 1, 5] = False
    expected, expected_log_sum_exp = oracles.attend(problem, mask)
    output, log_sum_exp = run(problem, mask, with_log_sum_exp)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)
    if with_log_sum_exp:
        assert log_sum_exp.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(
            log_sum_exp.double(), expected_log_sum_exp, rtol=tolerance, atol=2 * tolerance
        )
    else:
        assert log_sum_exp is None


def test_logits_are_at_least_fp32():
    states = torch.ones(1, 1, 2, 4, dtype=torch.bfloat16)
    assert attention_logits(states, states, 0.5).dtype == torch.float32
    assert torch.equal(attention_logits(states, states, 0.5), torch.full((1, 1, 2, 2), 2.0))


def test_huge_logits_do_not_overflow():
    logits = torch.tensor([[[[1e30, 1e30, 0.0]]]])
    values = torch.tensor([[[[1.0], [3.0], [100.0]]]])
    output, log_sum_exp = attend_to_logits(logits, values, torch.ones(1, 1, 1, 3).bool())
    assert output.item() == pytest.approx(2.0)
    assert log_sum_exp.item() == pytest.approx(1e30)


@pytest.mark.parametrize("with_log_sum_exp", [False, True])
def test_a_query_without_keys_gives_zero_and_finite_gradients(with_log_sum_exp):
    problem = random_problem(5, 9)
    mask = torch.ones(1, 4, 5, 9, dtype=torch.bool)
    mask[:, :, 2] = False
    leaves = [problem.queries, problem.keys, problem.values]
    for leaf in leaves:
        leaf.requires_grad_()
    output, log_sum_exp = run(problem, mask, with_log_sum_exp)
    assert not output[:, :, 2].any()
    if with_log_sum_exp:
        assert (log_sum_exp[:, :, 2] == -torch.inf).all()
    output.square().sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)
    assert not problem.queries.grad[:, :, 2].any()


@pytest.mark.parametrize("with_log_sum_exp", [False, True])
def test_huge_finite_values_at_hidden_keys_do_not_leak(with_log_sum_exp):
    mask = oracles.visible_keys(MASKED)
    expected, _ = run(MASKED, mask, with_log_sum_exp)
    hidden = (MASKED.key_positions < 0)[:, None, :, None]
    poisoned = MASKED.to(torch.float64)
    poisoned.keys = poisoned.keys.masked_fill(hidden, 1e30)
    poisoned.values = poisoned.values.masked_fill(hidden, -1e30)
    output, _ = run(poisoned, mask, with_log_sum_exp)
    assert torch.equal(output, expected)

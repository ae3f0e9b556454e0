"""Logits computed for a part of the vocabulary at a time."""

import pytest
import torch
from torch import nn

from rtpurbo.training import vocabulary
from rtpurbo.training.vocabulary import chosen_logits, log_probabilities, most_likely


@pytest.fixture(autouse=True, params=[(3, 5), (4, 50), (100, 7)])
def small_parts(request, monkeypatch):
    monkeypatch.setattr(vocabulary, "ROWS", request.param[0])
    monkeypatch.setattr(vocabulary, "COLUMNS", request.param[1])


def problem(bias=False):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(6, 50, bias=bias, dtype=torch.float64)
    for weight in head.parameters():
        weight.data.normal_(generator=generator)
    states = torch.randn(11, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    return states, head, torch.randint(50, (11, 4), generator=generator)


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_all_logits(bias):
    states, head, ids = problem(bias)
    ids[:, 1] = ids[:, 0]  # a token may be asked for twice
    found = chosen_logits(states, head, ids)
    logits = head(states)
    expected = logits.gather(-1, ids), logits.logsumexp(-1)
    torch.testing.assert_close(found, expected)
    inputs = [states, *head.parameters()]

    def gradients(chosen, total):
        return torch.autograd.grad((chosen**2).sum() + (total**3).sum(), inputs)

    torch.testing.assert_close(gradients(*found), gradients(*expected))


def test_gradients_of_a_frozen_head():
    states, head, ids = problem()
    head.requires_grad_(False)
    assert torch.autograd.gradcheck(lambda leaf: chosen_logits(leaf, head, ids), (states,))
    log_probabilities(states, head, ids).sum().backward()
    assert head.weight.grad is None
    assert states.grad is not None


def test_log_probabilities():
    states, head, ids = problem()
    expected = head(states).log_softmax(-1).gather(-1, ids)
    torch.testing.assert_close(log_probabilities(states, head, ids), expected)


@pytest.mark.parametrize("count", [1, 10, 50])
def test_the_most_likely_tokens(count):
    states, head, _ = problem(bias=True)
    ids, values = most_likely(states, head, count)
    expected = head(states).log_softmax(-1).topk(count)
    torch.testing.assert_close(values, expected.values)
    assert torch.equal(ids, expected.indices)


def test_indexers_round_half_precision_as_the_model_does():
    states, head, ids = problem()
    states, head = states.detach().bfloat16(), head.bfloat16()
    chosen, total = chosen_logits(states, head, ids)
    assert chosen.dtype == total.dtype == torch.float32
    assert torch.equal(chosen, head(states).float().gather(-1, ids))


def test_autocast_is_followed_forward_and_backward():
    states, head, ids = problem()
    states, head = states.detach().float().requires_grad_(), head.float()
    with torch.autocast("cpu", torch.bfloat16):
        chosen, _ = chosen_logits(states, head, ids)
        expected = head(states).float().gather(-1, ids)
    torch.testing.assert_close(chosen, expected)
    inputs = [states, head.weight]
    found = torch.autograd.grad(chosen.sum(), inputs)
    torch.testing.assert_close(
        found, torch.autograd.grad(expected.sum(), inputs), rtol=0.02, atol=0.02
    )
    assert all(gradient.dtype == torch.float32 for gradient in found)

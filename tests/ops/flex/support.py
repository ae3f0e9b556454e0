"""Whole sequences, and a layer by FlexAttention beside the specification."""

from dataclasses import replace

import torch

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout
from rtpurbo.ops.eager import headwise as specification
from rtpurbo.ops.flex import headwise as with_flex
from rtpurbo.ops.states import AttentionCall

RULE = AttentionRule(num_sink_tokens=2, min_tokens=2, sliding_window=40, block_size=8, top_p=0.7)
HEAD_SETS = [(), (0,), (1, 2), (0, 1, 2, 3)]

__all__ = ["HEAD_SETS", "RULE", "arguments", "eager", "flex", "leaves", "output_and_gradients"]


def arguments(problem, retrieval_heads, num_selecting=0):
    """The leading arguments of `headwise_attention` for keys that lie in order."""
    heads, key_value_heads = problem.queries.shape[1], problem.keys.shape[1]
    layout = HeadLayout.build(retrieval_heads, heads, key_value_heads, problem.queries.device)
    found = list(problem.layered(layout, num_selecting if retrieval_heads else 0))
    found[2:4] = (replace(states, in_order=True) for states in found[2:4])
    return found


def eager(*arguments, **options):
    return specification.headwise_attention(AttentionCall(*arguments, **options))


def flex(*arguments, **options):
    return with_flex.headwise_attention(AttentionCall(*arguments, **options))


def leaves(problem):
    return [problem.queries, problem.keys, problem.values]


def output_and_gradients(operator, problem, retrieval_heads, num_selecting, rule=RULE):
    for leaf in leaves(problem):
        leaf.requires_grad_()
    output, _ = operator(
        *arguments(problem, retrieval_heads, num_selecting), rule, scaling=problem.scaling
    )
    generator = torch.Generator(output.device).manual_seed(0)
    weights = torch.randn(
        output.shape, generator=generator, dtype=output.dtype, device=output.device
    )
    return output.detach(), torch.autograd.grad((output * weights).sum(), leaves(problem))

"""Compiled for a GPU: as exact as half precision allows, in memory that grows with the length alone."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.ops import headwise_attention
from rtpurbo.ops.api import chosen_backend
from rtpurbo.ops.states import AttentionCall
from tests.ops.flex.support import HEAD_SETS, arguments, eager, leaves, output_and_gradients
from tests.oracles import random_problem

pytestmark = pytest.mark.gpu
LONG = AttentionRule(sliding_window=1024)


def automatic(*call, **options):
    return headwise_attention(*call, **options)


def on_gpu(length, dtype=torch.bfloat16, **sizes):
    return random_problem(length, length, head_dim=64, index_dim=16, **sizes)._map(
        lambda tensor: tensor.to("cuda", dtype if tensor.is_floating_point() else tensor.dtype)
    )


@pytest.mark.parametrize("retrieval_heads", HEAD_SETS, ids=str)
@pytest.mark.parametrize("num_selecting", [0, 40])
@pytest.mark.parametrize("length", [1024, 1500])
def test_equals_the_specification(retrieval_heads, num_selecting, length):
    problem = on_gpu(length)
    exact = problem._map(
        lambda tensor: tensor.detach().float() if tensor.is_floating_point() else tensor
    )
    call = (retrieval_heads, num_selecting)
    results = [
        [output, *gradients]
        for output, gradients in (
            output_and_gradients(automatic, problem, *call),
            output_and_gradients(eager, problem, *call),
            output_and_gradients(eager, exact, *call),
        )
    ]
    for ours, plain, right in zip(*results, strict=True):
        error, allowed = ((part.float() - right).norm() / right.norm() for part in (ours, plain))
        # As far off as plain PyTorch is in half precision. At the edge of a selection either takes other
        # keys than fp32 does, each its own: a few rows of the output, and a little of every gradient.
        assert error < (2.5 if num_selecting else 1.5) * allowed + 1e-3
        assert allowed < 0.1
    [[ours, *_], [plain, *_], [right, *_]] = results
    rest = slice(length - num_selecting)
    error, allowed = ((part.float() - right)[:, :, rest].norm() for part in (ours, plain))
    assert error < 1.5 * allowed + 1e-3 * right.norm()


@pytest.mark.parametrize("num_selecting", [0, 40])
def test_training_takes_it_where_kernels_have_no_gradients(num_selecting):
    problem = on_gpu(1024)
    call = arguments(problem, (0, 3), num_selecting)
    assert chosen_backend("auto", AttentionCall(*call, LONG, 0.1)) != "flex"
    for leaf in leaves(problem):
        leaf.requires_grad_()
    call = arguments(problem, (0, 3), num_selecting)
    assert chosen_backend("auto", AttentionCall(*call, LONG, 0.1)) == "flex"
    short = arguments(on_gpu(200), (0, 3), num_selecting)
    short[0].requires_grad_()
    assert chosen_backend("auto", AttentionCall(*short, LONG, 0.1)) == "eager"


@pytest.mark.parametrize("granularity", ["token", "block"])
def test_nothing_waits_and_nothing_is_as_large_as_a_mask(granularity):
    problem, rule = on_gpu(16384), replace(LONG, granularity=granularity)
    output_and_gradients(automatic, problem, (0, 3), 40, rule)  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call = arguments(problem, (0, 3), 40)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, _ = automatic(*call, rule, scaling=problem.scaling)
        output.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # A byte for each pair of a row and a key of one head would be 256 MiB.
    assert torch.cuda.max_memory_allocated() - before < 200 * 2**20

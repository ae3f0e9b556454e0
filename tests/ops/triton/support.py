"""Problems for kernels, and how exact a kernel must be: as exact as plain PyTorch, nearly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rtpurbo.ops import KeyValueStates
from rtpurbo.ops.eager.attend import attend
from tests import oracles

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# The interpreter's dot is wrong for bfloat16.
DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16, torch.float32]
EPSILON = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24}


def kernel_problem(q_len: int, k_len: int, dtype: torch.dtype, **options) -> oracles.Problem:
    """A random problem in a kernel's precision, on its device; head_dim is 16 unless said."""
    options = {"head_dim": 16, **options}
    problem = oracles.random_problem(q_len, k_len, **options).to(dtype)
    return problem._map(lambda tensor: tensor.to(DEVICE))


def on_cpu(problem: oracles.Problem) -> oracles.Problem:
    """The same problem where the oracle works."""
    return problem._map(lambda tensor: tensor.cpu())


def slotted(states: KeyValueStates, padding: Sequence[int]) -> KeyValueStates:
    """The states of left-padded sequences, saying so as a cache does."""
    if not any(padding):
        return replace(states, in_order=True)
    slots = torch.tensor(padding, dtype=torch.int32, device=states.keys.device)
    return replace(states, first_slots=slots)


def assert_as_exact_as_eager(
    problem: oracles.Problem, mask: Tensor, output: Tensor, log_sum_exp: Tensor | None = None
) -> None:
    """The kernel's error against fp64 is at most twice that of eager in the same precision."""
    expected, expected_sums = oracles.attend(on_cpu(problem), mask.cpu())
    kv_head_index = problem.kv_head_index.to(output.device)
    plain, plain_sums = attend(
        problem.queries,
        problem.keys[:, kv_head_index],
        problem.values[:, kv_head_index],
        mask.to(output.device),
        problem.scaling,
        True,
    )
    floor = 2 * EPSILON[output.dtype]

    def close(actual: Tensor, reference: Tensor, exact: Tensor) -> None:
        exact = exact.to(actual.device)
        blind = exact.isinf()
        assert torch.equal(blind, actual.isinf())
        error = (actual.double() - exact)[~blind].abs().max().item() if (~blind).any() else 0.0
        allowed = (reference.double() - exact)[~blind].abs().max().item() if (~blind).any() else 0.0
        scale = exact[~blind].abs().max().item() if (~blind).any() else 1.0
        assert error <= 2 * allowed + floor * max(scale, 1e-3), (error, allowed)

    close(output, plain, expected)
    if log_sum_exp is not None:
        close(log_sum_exp, plain_sums, expected_sums)

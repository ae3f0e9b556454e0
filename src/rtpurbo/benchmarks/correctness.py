"""Correctness check before timing: sampled queries of an output against an fp64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rtpurbo.benchmarks.layer import LayerStates

# Queries that are compared: random ones, and the last ones.
RANDOM_QUERIES = 64
LAST_QUERIES = 64
# Queries of one head that are computed at once: 256 MiB of fp64 scores at 1M tokens.
QUERIES_AT_ONCE = 32
# Allows for one more rounding than plain PyTorch has.
EPSILON = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-22}

# Visible keys of queries: (sequence, head, int64 [queries]) to bool [queries, k_len].
Mask = Callable[[int, int, Tensor], Tensor]


@dataclass(frozen=True)
class Comparison:
    """Largest relative error of an output against fp64, over the compared queries.

    Attributes:
        error: norm of the kernel's error, relative to the norm of the exact output.
        complaint: description of the error; None if it is small enough.
    """

    error: float
    complaint: str | None


def sampled_queries(length: int, device: torch.device) -> Tensor:
    """Query indices to compare, int64, ascending."""
    generator = torch.Generator().manual_seed(0)
    anywhere = torch.randint(length, (RANDOM_QUERIES,), generator=generator)
    last = torch.arange(max(0, length - LAST_QUERIES), length)
    return torch.cat([anywhere, last]).unique().to(device)


def compare(
    output: Tensor, states: LayerStates, mask: Mask, query_indices: Tensor | None = None
) -> Comparison:
    """Compares queries of an output with fp64 attention under an explicit mask.

    Args:
        output: [batch, num_attention_heads, q_len, head_dim].
        states: inputs of the output.
        mask: visible keys of each query.
        query_indices: int64, queries to compare; a sample if None.
    """
    if query_indices is None:
        query_indices = sampled_queries(output.shape[2], output.device)
    group = states.queries.shape[1] // states.keys.shape[1]
    worst = torch.zeros(2, dtype=torch.float64, device=output.device)
    for sequence in range(output.shape[0]):
        for head in range(output.shape[1]):
            keys, values = (part[sequence, head // group] for part in (states.keys, states.values))
            exact_keys, exact_values = keys.double(), values.double()
            for some in query_indices.split(QUERIES_AT_ONCE):
                queries = states.queries[sequence, head, some]
                visible = mask(sequence, head, some)
                exact = _attend(queries.double(), exact_keys, exact_values, visible, states.scaling)
                plain = _attend(queries, keys, values, visible, states.scaling)
                both = torch.stack([output[sequence, head, some], plain]).double()
                errors = (both - exact).norm(dim=-1) / exact.norm(dim=-1)
                worst = torch.maximum(worst, errors.amax(-1))  # keeps NaN
    error, plain_error = worst.tolist()
    complaint = None
    if not error <= 2 * plain_error + EPSILON[output.dtype]:  # true for NaN
        complaint = (
            f"the relative error of its output is {error:.3g}, where plain PyTorch has "
            f"{plain_error:.3g}"
        )
    return Comparison(error, complaint)


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float
) -> Tensor:
    logits = (queries @ keys.T * scaling).masked_fill(~visible, -torch.inf)
    kind = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(-1, dtype=kind).to(values.dtype) @ values


def causal(positions: Tensor, length: int) -> Tensor:
    """Causal mask of queries at `positions`: bool [queries, length]."""
    return torch.arange(length, device=positions.device) <= positions[:, None]


def near(positions: Tensor, length: int, num_sinks: int, window: int) -> Tensor:
    """Mask of sinks and window of queries at `positions`: bool [queries, length]."""
    keys = torch.arange(length, device=positions.device)
    recent = keys > positions[:, None] - window
    return ((keys < num_sinks) | recent) & (keys <= positions[:, None])

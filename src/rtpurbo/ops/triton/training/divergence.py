"""Loss of stage 1 and its gradients: launches of `divergence_kernels`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from rtpurbo.config import AttentionRule
from rtpurbo.ops.triton.device_functions import LOG2_E
from rtpurbo.ops.triton.tiles import TileSizes, descriptor
from rtpurbo.ops.triton.training.divergence_kernels import (
    LIFT,
    key_gradient_kernel,
    query_gradient_kernel,
)
from rtpurbo.ops.triton.training.ranges import key_block_ranges, query_block_ranges

LARGEST_HEAD_DIM = 128
LARGEST_INDEX_DIM = 64
# Magnitude that the largest weighted index query is scaled to in the key gradients, and its lower limit.
LARGEST_PRODUCT = 2.0**14
SMALLEST = 1e-30


def indexer_divergence(
    query_states: Tensor,
    key_states: Tensor,
    key_value_heads: Tensor,
    index_queries: Tensor,
    index_keys: Tensor,
    query_indices: Tensor,
    document_starts: Tensor,
    rule: AttentionRule,
    *,
    scaling: float,
) -> Tensor:
    """Same as `rtpurbo.ops.eager.divergence.indexer_divergence`, with memory linear in the length.

    Index states are multiplied in float16, the dtype of the cache, for models in half precision, and in fp32
    for models in fp32.

    Returns:
        fp32 [heads, queries].
    """
    counts_all = rule.reading == "paper"
    problem = _Problem(
        aligned(query_states),
        aligned(key_states),
        key_value_heads.to(torch.int32),
        query_indices,
        document_starts[query_indices],
        0 if counts_all else rule.num_sink_tokens,
        0 if counts_all else rule.near_window,
        scaling * LOG2_E.value,
    )
    return _Divergence.apply(index_queries, index_keys, problem)


def unsupported_reasons(
    query_states: Tensor, key_states: Tensor, index_queries: Tensor
) -> Iterator[str]:
    """Yields the reasons for which the kernels do not support a call."""
    if query_states.shape[-1] > LARGEST_HEAD_DIM:
        yield f"head_dim {query_states.shape[-1]} is above {LARGEST_HEAD_DIM}"
    if index_queries.shape[-1] > LARGEST_INDEX_DIM:
        yield f"index_dim {index_queries.shape[-1]} is above {LARGEST_INDEX_DIM}"
    if query_states.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        yield f"states are in {query_states.dtype}"
    if query_states.dtype != key_states.dtype:
        yield "queries and keys differ in dtype"
    if torch.is_grad_enabled() and (query_states.requires_grad or key_states.requires_grad):
        yield "the kernels compute no gradients of the model's own queries and keys"


@dataclass(frozen=True)
class _Problem:
    """Inputs that the forward and backward kernels share.

    Attributes:
        query_states: [heads, queries, head_dim], aligned for TMA.
        key_states: [key_value_heads, length, head_dim], aligned for TMA.
        key_value_heads: int32 [heads], KV head index of each head.
        query_indices: int64 [queries], indices of the queries in the packed sequence.
        starts: int64 [queries], index of the first token of each query's document.
        margin: sinks, which get no gradient.
        lag: window keys, which get no gradient.
        scale: factor on the dot products, including log2(e).
    """

    query_states: Tensor
    key_states: Tensor
    key_value_heads: Tensor
    query_indices: Tensor
    starts: Tensor
    margin: int
    lag: int
    scale: float

    @property
    def index_dtype(self) -> torch.dtype:
        """Dtype of the products with index states and gradients."""
        is_single = self.query_states.dtype == torch.float32
        return torch.float32 if is_single else torch.float16

    def kernel_indices(self) -> tuple[Tensor, Tensor]:
        """Query indices and document starts in int32."""
        return self.query_indices.to(torch.int32), self.starts.to(torch.int32)


class _Divergence(torch.autograd.Function):
    """Autograd function: one kernel for loss and index query gradients, one for index key gradients."""

    @staticmethod
    def forward(ctx: Any, index_queries: Tensor, index_keys: Tensor, problem: _Problem) -> Tensor:
        """Losses [heads, queries]."""
        heads, num_queries, index_dim = index_queries.shape
        head_dim = problem.query_states.shape[-1]
        with_gradient = any(ctx.needs_input_grad[:2])
        queries, keys = (
            aligned(states.to(problem.index_dtype)) for states in (index_queries, index_keys)
        )
        D, I = padded(head_dim), padded(index_dim)
        tile = query_tiles(I, problem.query_states.dtype)
        empty = index_queries.new_empty
        divergence = empty(heads, num_queries, dtype=torch.float32)
        offsets = (divergence, divergence)
        gradient = divergence
        if with_gradient:
            offsets = (torch.empty_like(divergence), torch.empty_like(divergence))
            gradient = empty(heads, num_queries, I, dtype=torch.float32)
        tiles = query_block_ranges(
            problem.query_indices,
            problem.starts,
            problem.margin,
            problem.lag,
            tile.queries,
            tile.keys,
        )
        if divergence.numel():
            query_gradient_kernel[(len(tiles) * heads,)](
                descriptor(problem.query_states, tile.queries, D),
                descriptor(problem.key_states, tile.keys, D),
                descriptor(queries, tile.queries, I),
                descriptor(keys, tile.keys, I),
                problem.key_value_heads,
                *problem.kernel_indices(),
                tiles,
                divergence,
                *offsets,
                gradient,
                num_queries,
                problem.margin,
                problem.lag,
                problem.scale,
                WITH_GRADIENT=with_gradient,
                STAGES=tile.stages,
                M=tile.queries,
                N=tile.keys,
                D=D,
                I=I,
                **tile.launch(),
            )
        ctx.problem, ctx.index_dim = problem, index_dim
        ctx.dtypes = index_queries.dtype, index_keys.dtype
        if with_gradient:
            ctx.save_for_backward(queries, keys, *offsets, gradient)
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of index queries and index keys."""
        query_gradient = key_gradient = None
        if ctx.needs_input_grad[0]:
            *_, gradient = ctx.saved_tensors
            query_gradient = upstream[..., None] * gradient[..., : ctx.index_dim]
            query_gradient = query_gradient.to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            key_gradient = _key_gradient(ctx, upstream).to(ctx.dtypes[1])
        return query_gradient, key_gradient, None


def _key_gradient(ctx: Any, upstream: Tensor) -> Tensor:
    """Gradients of the index keys, fp32 [heads, length, index_dim]."""
    problem: _Problem = ctx.problem
    queries, keys, teacher_offsets, student_offsets, _ = ctx.saved_tensors
    heads, length, aligned_dim = keys.shape
    D, I = padded(problem.query_states.shape[-1]), padded(aligned_dim)
    tile = key_tiles(I, problem.query_states.dtype)
    gradient = torch.empty(heads, length, I, dtype=torch.float32, device=keys.device)
    if not teacher_offsets.numel():
        return gradient[..., : ctx.index_dim].zero_()
    # Scaled to the range of half precision, so that queries with small weights do not underflow.
    weighted = queries.float() * upstream[..., None]
    unit = weighted.abs().amax().clamp(min=SMALLEST) / LARGEST_PRODUCT
    weighted = (weighted / unit).to(queries.dtype)
    tiles = key_block_ranges(
        problem.query_indices,
        problem.starts,
        length,
        problem.margin,
        problem.lag,
        tile.queries,
        tile.keys,
    )
    key_gradient_kernel[(len(tiles) * heads,)](
        descriptor(problem.query_states, tile.queries, D),
        descriptor(problem.key_states, tile.keys, D),
        descriptor(queries, tile.queries, I),
        descriptor(weighted, tile.queries, I),
        descriptor(keys, tile.keys, I),
        problem.key_value_heads,
        *problem.kernel_indices(),
        tiles,
        teacher_offsets,
        student_offsets,
        gradient,
        problem.query_indices.numel(),
        length,
        problem.margin,
        problem.lag,
        problem.scale,
        STAGES=tile.stages,
        M=tile.queries,
        N=tile.keys,
        D=D,
        I=I,
        **tile.launch(),
    )
    return gradient[..., : ctx.index_dim] * (unit * 2.0**-LIFT.value)


def query_tiles(index_dim: int, dtype: torch.dtype) -> TileSizes:
    """Tile sizes of the query gradient kernel, which iterates over keys; `index_dim` is padded."""
    if dtype == torch.float32:
        return TileSizes(128, 32, 8, 1)
    # Two programs per multiprocessor: one computes exponentials while the other multiplies.
    if index_dim <= 16:
        return TileSizes(128, 64, 8, 2, 128)
    return TileSizes(128, 32, 8, 3, 128)


def key_tiles(index_dim: int, dtype: torch.dtype) -> TileSizes:
    """Tile sizes of the key gradient kernel, which iterates over queries; `index_dim` is padded."""
    if dtype == torch.float32:
        return TileSizes(32, 128, 8, 1)
    if index_dim <= 16:
        return TileSizes(64, 128, 8, 2, 128)
    return TileSizes(32, 128, 8, 3, 128)


def padded(size: int) -> int:
    """Width of a tile with `size` dimensions."""
    return max(16, triton.next_power_of_2(size))


def aligned(states: Tensor) -> Tensor:
    """Contiguous [heads, length, dimensions] states, padded to multiples of 16 bytes per token for TMA."""
    padding = -states.shape[-1] % (16 // states.element_size())
    return F.pad(states, (0, padding)).contiguous()

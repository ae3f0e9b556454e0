"""The loss of stage 1 and its gradients: how the kernels in `divergence_kernels` are launched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.triton.softmax import LOG2_E
from rtpurbo.ops.triton.training.divergence_kernels import LIFT, columns_kernel, rows_kernel
from rtpurbo.ops.triton.training.tiles import tiles_of_keys, tiles_of_rows

LARGEST_HEAD_DIM = 128
LARGEST_INDEX_DIM = 64
# What the largest weighted index query becomes for the sweep over rows, and the least that can be scaled so.
LARGEST_PRODUCT = 2.0**14
SMALLEST = 1e-30


def indexer_divergence(
    query_states: Tensor,
    key_states: Tensor,
    key_value_heads: Tensor,
    index_queries: Tensor,
    index_keys: Tensor,
    rows: Tensor,
    document_starts: Tensor,
    rule: AttentionRule,
    *,
    scaling: float,
) -> Tensor:
    """As `rtpurbo.ops.eager.divergence.indexer_divergence`, in memory of the length.

    Index states are multiplied in float16 where the model's are in half precision, as they are kept
    in the cache, and in fp32 where those are.

    Returns:
        fp32 [heads, rows].
    """
    problem = _Problem.build(
        query_states, key_states, key_value_heads, rows, document_starts, rule, scaling
    )
    return _Divergence.apply(index_queries, index_keys, problem)


def refusals(query_states: Tensor, key_states: Tensor, index_queries: Tensor) -> Iterator[str]:
    """Why these kernels cannot serve such a call; nothing if they can."""
    if query_states.shape[-1] > LARGEST_HEAD_DIM:
        yield f"head_dim {query_states.shape[-1]} is above {LARGEST_HEAD_DIM}"
    if index_queries.shape[-1] > LARGEST_INDEX_DIM:
        yield f"index_dim {index_queries.shape[-1]} is above {LARGEST_INDEX_DIM}"
    if query_states.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        yield f"states are in {query_states.dtype}"
    if query_states.dtype != key_states.dtype:
        yield "queries and keys differ in their type"
    if torch.is_grad_enabled() and (query_states.requires_grad or key_states.requires_grad):
        yield "they compute no gradients of the model's own queries and keys"


@dataclass(frozen=True)
class _Problem:
    """What does not change from sweep to sweep.

    Attributes:
        query_states: [heads, rows, head_dim], as tiles are loaded from it.
        key_states: [key_value_heads, length, head_dim], likewise.
        key_value_heads: int32 [heads].
        rows: int64 [rows].
        starts: int64 [rows], where the row's document begins.
        margin: sinks that do not count.
        lag: recent keys that do not count.
        scale: factor on the dot products that gives powers of two.
    """

    query_states: Tensor
    key_states: Tensor
    key_value_heads: Tensor
    rows: Tensor
    starts: Tensor
    margin: int
    lag: int
    scale: float

    @classmethod
    def build(
        cls,
        query_states: Tensor,
        key_states: Tensor,
        key_value_heads: Tensor,
        rows: Tensor,
        document_starts: Tensor,
        rule: AttentionRule,
        scaling: float,
    ) -> _Problem:
        counts_all = rule.reading == "paper"
        return cls(
            loadable(query_states),
            loadable(key_states),
            key_value_heads.to(torch.int32),
            rows,
            document_starts[rows],
            0 if counts_all else rule.num_sink_tokens,
            0 if counts_all else rule.near_window,
            scaling * LOG2_E.value,
        )

    @property
    def index_dtype(self) -> torch.dtype:
        """In which index states and gradients are multiplied."""
        is_single = self.query_states.dtype == torch.float32
        return torch.float32 if is_single else torch.float16

    def rows_and_starts(self) -> tuple[Tensor, Tensor]:
        """As kernels read them."""
        return self.rows.to(torch.int32), self.starts.to(torch.int32)


class _Divergence(torch.autograd.Function):
    """The sweep over keys gives loss and gradients of index queries, that over rows those of index keys."""

    @staticmethod
    def forward(ctx: Any, index_queries: Tensor, index_keys: Tensor, problem: _Problem) -> Tensor:
        """Losses [heads, rows]."""
        heads, num_rows, index_dim = index_queries.shape
        head_dim = problem.query_states.shape[-1]
        with_gradient = any(ctx.needs_input_grad[:2])
        queries, keys = (
            loadable(states.to(problem.index_dtype)) for states in (index_queries, index_keys)
        )
        D, I = padded(head_dim), padded(index_dim)
        tile = RowTiles.choose(I, problem.query_states.dtype)
        empty = index_queries.new_empty
        divergence = empty(heads, num_rows, dtype=torch.float32)
        offsets = (divergence, divergence)
        gradient = divergence
        if with_gradient:
            offsets = (torch.empty_like(divergence), torch.empty_like(divergence))
            gradient = empty(heads, num_rows, I, dtype=torch.float32)
        tiles = tiles_of_rows(
            problem.rows, problem.starts, problem.margin, problem.lag, tile.rows, tile.keys
        )
        if divergence.numel():
            rows_kernel[(len(tiles) * heads,)](
                descriptor(problem.query_states, tile.rows, D),
                descriptor(problem.key_states, tile.keys, D),
                descriptor(queries, tile.rows, I),
                descriptor(keys, tile.keys, I),
                problem.key_value_heads,
                *problem.rows_and_starts(),
                tiles,
                divergence,
                *offsets,
                gradient,
                num_rows,
                problem.margin,
                problem.lag,
                problem.scale,
                WITH_GRADIENT=with_gradient,
                STAGES=tile.stages,
                M=tile.rows,
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
        queries, keys, teacher_offsets, student_offsets, gradient = ctx.saved_tensors
        query_gradient = key_gradient = None
        if ctx.needs_input_grad[0]:
            query_gradient = upstream[..., None] * gradient[..., : ctx.index_dim]
            query_gradient = query_gradient.to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            # Scaled to fill the range of half precision, so that rows that count little do not vanish.
            weighted = queries.float() * upstream[..., None]
            largest = weighted.abs().amax() if weighted.numel() else weighted.sum()
            unit = largest.clamp(min=SMALLEST) / LARGEST_PRODUCT
            key_gradient = _columns(
                ctx.problem,
                queries,
                (weighted / unit).to(queries.dtype),
                keys,
                teacher_offsets,
                student_offsets,
            )
            key_gradient = key_gradient[..., : ctx.index_dim] * (unit * 2.0**-LIFT.value)
            key_gradient = key_gradient.to(ctx.dtypes[1])
        return query_gradient, key_gradient, None


def _columns(
    problem: _Problem,
    queries: Tensor,
    weighted: Tensor,
    keys: Tensor,
    teacher_offsets: Tensor,
    student_offsets: Tensor,
) -> Tensor:
    """Gradients of the index keys times two to the lift, fp32 [heads, length, padded index_dim]."""
    heads, length, index_dim = keys.shape
    D, I = padded(problem.query_states.shape[-1]), padded(index_dim)
    tile = ColumnTiles.choose(I, problem.query_states.dtype)
    gradient = torch.empty(heads, length, I, dtype=torch.float32, device=keys.device)
    if not teacher_offsets.numel():
        return gradient.zero_()
    tiles = tiles_of_keys(
        problem.rows, problem.starts, length, problem.margin, problem.lag, tile.rows, tile.keys
    )
    columns_kernel[(len(tiles) * heads,)](
        descriptor(problem.query_states, tile.rows, D),
        descriptor(problem.key_states, tile.keys, D),
        descriptor(queries, tile.rows, I),
        descriptor(weighted, tile.rows, I),
        descriptor(keys, tile.keys, I),
        problem.key_value_heads,
        *problem.rows_and_starts(),
        tiles,
        teacher_offsets,
        student_offsets,
        gradient,
        problem.rows.numel(),
        length,
        problem.margin,
        problem.lag,
        problem.scale,
        STAGES=tile.stages,
        M=tile.rows,
        N=tile.keys,
        D=D,
        I=I,
        **tile.launch(),
    )
    return gradient


@dataclass(frozen=True)
class Tiles:
    """Shape of a program."""

    rows: int
    keys: int
    num_warps: int
    stages: int
    max_registers: int | None = None

    def launch(self) -> dict[str, int]:
        """Launch options; the interpreter does not know all of them."""
        options = {"num_warps": self.num_warps}
        if self.max_registers is not None and not knobs.runtime.interpret:
            options["maxnreg"] = self.max_registers
        return options


class RowTiles(Tiles):
    """Of the sweep over keys."""

    @classmethod
    def choose(cls, index_dim: int, dtype: torch.dtype) -> RowTiles:
        """For a padded index size and element type."""
        if dtype == torch.float32:
            return cls(128, 32, 8, 1)
        # Two programs a multiprocessor: one computes exponentials while the other multiplies.
        if index_dim <= 16:
            return cls(128, 64, 8, 2, 128)
        return cls(128, 32, 8, 3, 128)


class ColumnTiles(Tiles):
    """Of the sweep over rows."""

    @classmethod
    def choose(cls, index_dim: int, dtype: torch.dtype) -> ColumnTiles:
        """For a padded index size and element type."""
        if dtype == torch.float32:
            return cls(32, 128, 8, 1)
        if index_dim <= 16:
            return cls(64, 128, 8, 2, 128)
        return cls(32, 128, 8, 3, 128)


def padded(size: int) -> int:
    """Columns of a tile that holds so many dimensions."""
    return max(16, triton.next_power_of_2(size))


def loadable(states: Tensor) -> Tensor:
    """The same [heads, length, dimensions], in memory as tiles can be loaded from it: rows of 16 bytes."""
    wanted = -states.shape[-1] % (16 // states.element_size())
    return F.pad(states, (0, wanted)).contiguous()


def descriptor(states: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A view of [heads, length, dimensions] states that loads tiles of rows of one head."""
    return TensorDescriptor(states, list(states.shape), list(states.stride()), [1, rows, columns])

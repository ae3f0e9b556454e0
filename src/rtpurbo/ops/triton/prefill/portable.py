"""Attention of many query rows: how the kernels in `portable_kernels` are launched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rtpurbo.ops.paged import PagedStates
from rtpurbo.ops.states import KeyValueStates
from rtpurbo.ops.triton.heads import HeadTable
from rtpurbo.ops.triton.prefill.portable_kernels import listed_kernel, window_kernel
from rtpurbo.ops.triton.softmax import LOG2_E


@dataclass(frozen=True)
class BlockLists:
    """Blocks of keys that tiles of query rows read, beside their near keys.

    Attributes:
        blocks: int32 [batch, heads, tiles, edge_slots + max_blocks], numbers of blocks: those that
            need a mask (they hold sinks, or the edge of the window runs through them) from entry 0
            on; the others, ascending and an even number, from entry `edge_slots` on.
        counts: int32 [batch, heads, tiles, 2], how many there are of each.
        edge_slots: room for those that need a mask.
        block_size: keys in a block.
        tile_size: query rows in a tile.
    """

    blocks: Tensor
    counts: Tensor
    edge_slots: int
    block_size: int
    tile_size: int


def window_attention(
    query_states: Tensor,
    sources: list[tuple[KeyValueStates | PagedStates, HeadTable]],
    starts: Tensor,
    num_sink_tokens: int,
    scaling: float,
    output: Tensor,
    log_sum_exp: Tensor | None,
) -> None:
    """Sinks and window of every head of the tables, written into the heads' places.

    Args:
        query_states: [batch, num_attention_heads, q_len, head_dim], after RoPE.
        sources: states, and the heads that read them.
        starts: int32 [batch], position of the first query row.
        num_sink_tokens: S.
        scaling: factor on the dot products.
        output: shaped as the queries; heads outside the tables are left alone.
        log_sum_exp: fp32 [batch, num_attention_heads, q_len], or None if not wanted.
    """
    batch, _, q_len, head_dim = query_states.shape
    for states, table in sources:
        if not len(table):
            continue
        tile = TileSizes.choose(head_dim, query_states.dtype, page_size(states) > 0)
        slots, sinks = slot_shifts(states)
        lse = starts if log_sum_exp is None else log_sum_exp
        window_kernel[(triton.cdiv(q_len, tile.rows) * len(table), batch)](
            descriptor(query_states, tile.rows),
            *key_value_arguments(states, tile.keys),
            output,
            lse,
            table.heads,
            table.key_value_heads,
            table.windows,
            starts,
            starts if slots is None else slots,
            starts if sinks is None else sinks,
            q_len,
            len(table),
            table.num_dense,
            head_dim,
            num_sink_tokens,
            scaling * LOG2_E.value,
            *output.stride(),
            *((0, 0) if log_sum_exp is None else log_sum_exp.stride()[:2]),
            HAS_SLOTS=slots is not None,
            HAS_LSE=log_sum_exp is not None,
            PAGE_SIZE=page_size(states),
            STAGES=tile.stages,
            M=tile.rows,
            N=tile.keys,
            D=triton.next_power_of_2(head_dim),
            **tile.launch(),
        )


def listed_attention(
    query_states: Tensor,
    states: KeyValueStates | PagedStates,
    table: HeadTable,
    starts: Tensor,
    lists: BlockLists,
    row_offset: int,
    num_sink_tokens: int,
    scaling: float,
    output: Tensor,
    log_sum_exp: Tensor,
) -> None:
    """Adds the far keys of listed blocks to what `window_attention` left in output and log-sum-exp.

    Args:
        query_states: [batch, num_attention_heads, q_len, head_dim].
        states: keys and values.
        table: the heads of the lists, with their near windows.
        starts: int32 [batch], position of the first query row of the call.
        lists: blocks for tiles of rows, the first of which begins at row `row_offset`.
        row_offset: where the lists begin, in rows of the call.
        num_sink_tokens: S.
        scaling: factor on the dot products.
        output: shaped as the queries; read and written.
        log_sum_exp: fp32 [batch, num_attention_heads, q_len]; read and written.
    """
    batch, _, q_len, head_dim = query_states.shape
    tile = TileSizes.choose(head_dim, query_states.dtype, page_size(states) > 0)
    slots, _ = slot_shifts(states)
    listed_kernel[(lists.counts.shape[2] * len(table), batch)](
        descriptor(query_states, lists.tile_size),
        *key_value_arguments(states, lists.block_size),
        output,
        log_sum_exp,
        table.heads,
        table.key_value_heads,
        table.windows,
        starts,
        starts if slots is None else slots,
        lists.blocks,
        lists.counts,
        q_len,
        len(table),
        row_offset,
        head_dim,
        num_sink_tokens,
        scaling * LOG2_E.value,
        *output.stride(),
        *log_sum_exp.stride()[:2],
        *lists.blocks.stride()[:3],
        *lists.counts.stride()[:3],
        HAS_SLOTS=slots is not None,
        PAGE_SIZE=page_size(states),
        STAGES=tile.stages,
        EDGE=lists.edge_slots,
        M=lists.tile_size,
        N=lists.block_size,
        D=triton.next_power_of_2(head_dim),
        **tile.launch(),
    )


@dataclass(frozen=True)
class TileSizes:
    """Shape of a program; measured on an H100 where a comment says so."""

    rows: int
    keys: int
    num_warps: int
    stages: int
    max_registers: int | None = None

    @classmethod
    def choose(cls, head_dim: int, dtype: torch.dtype, paged: bool) -> TileSizes:
        """For a head size and element type."""
        if dtype == torch.float32:
            return cls(64, 32, 4, 1)
        if paged:
            # Addresses take registers: larger tiles spill.
            return cls(128 if head_dim <= 128 else 64, 32, 8, 2)
        if head_dim <= 64:
            return cls(128, 64, 4, 3)
        if head_dim <= 128:
            # Two programs a multiprocessor: one computes exponentials while the other multiplies
            # (524 TFLOP/s against 426 with as many registers as the compiler likes).
            return cls(128, 64, 8, 2, 128)
        return cls(128, 64, 8, 2)

    def launch(self) -> dict[str, int]:
        """Launch options; the interpreter knows none of them."""
        options = {"num_warps": self.num_warps}
        if self.max_registers is not None and torch.cuda.is_available():
            options["maxnreg"] = self.max_registers
        return options


def slot_shifts(states: KeyValueStates | PagedStates) -> tuple[Tensor | None, Tensor | None]:
    """`first_slots` and `sink_slots`; None where slots are positions, as in pages."""
    if isinstance(states, PagedStates):
        return None, None
    first = states.first_slots
    return first, first if states.sink_slots is None else states.sink_slots


def page_size(states: KeyValueStates | PagedStates) -> int:
    """Tokens of a page; 0 for states in one tensor."""
    return states.page_size if isinstance(states, PagedStates) else 0


def key_value_arguments(states: KeyValueStates | PagedStates, rows: int) -> tuple[Any, ...]:
    """Keys, their strides, values, their strides, block table, its stride: as kernels take them."""
    if isinstance(states, PagedStates):
        keys, values = states.key_pages, states.value_pages
        table = states.block_table
        return keys, keys.stride()[:3], values, values.stride()[:3], table, table.stride(0)
    strides = (0, 0, 0)
    return descriptor(states.keys, rows), strides, descriptor(states.values, rows), strides, None, 0


def descriptor(states: Tensor, rows: int) -> TensorDescriptor:
    """A view of [batch, heads, length, head_dim] states that loads tiles of rows of one head."""
    columns = triton.next_power_of_2(states.shape[-1])
    return TensorDescriptor(
        states, list(states.shape), list(states.stride()), [1, 1, rows, columns]
    )

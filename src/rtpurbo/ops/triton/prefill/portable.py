"""Prefill attention with portable Triton kernels (`portable_kernels`): launches and tile sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rtpurbo.ops.states import KeyValueStates, PagedStates, States
from rtpurbo.ops.triton.device_functions import LOG2_E
from rtpurbo.ops.triton.heads import HeadTable
from rtpurbo.ops.triton.prefill.portable_kernels import block_sparse_kernel, window_kernel
from rtpurbo.ops.triton.tiles import TileSizes, descriptor


@dataclass(frozen=True)
class PackedQueries:
    """Division of packed queries [1, num_attention_heads, total, head_dim] among sequences with pages.

    Attributes:
        offsets: int32 [batch], index of the first query of each sequence.
        counts: int32 [batch], number of queries; 0 for none.
        most: upper limit of `counts`.
    """

    offsets: Tensor
    counts: Tensor
    most: int


@dataclass(frozen=True)
class BlockLists:
    """Far key blocks that each query block reads in addition to its near keys.

    Attributes:
        blocks: int32 [batch, heads, query blocks, edge_slots + max_blocks], block indices. Blocks that need a
            mask (with sinks, or at the edge of the window) are stored from entry 0 on; the others, ascending
            and of even number, from entry `edge_slots` on.
        counts: int32 [batch, heads, query blocks, 2], number of blocks of either kind.
        edge_slots: capacity for blocks that need a mask.
        block_size: keys of a block.
        query_block_size: queries of a query block.
    """

    blocks: Tensor
    counts: Tensor
    edge_slots: int
    block_size: int
    query_block_size: int

    def valid(self) -> Tensor:
        """Mask of the used entries of `blocks`, bool of the same shape."""
        places = torch.arange(self.blocks.shape[-1], device=self.blocks.device)
        edge, whole = self.counts[..., :1], self.counts[..., 1:]
        return (places < edge) | ((places >= self.edge_slots) & (places < self.edge_slots + whole))


def window_attention(
    query_states: Tensor,
    sources: list[tuple[States, HeadTable]],
    starts: Tensor,
    num_sink_tokens: int,
    scaling: float,
    output: Tensor,
    log_sum_exp: Tensor | None,
    packed: PackedQueries | None = None,
) -> None:
    """Window attention (sinks and window) of the heads in the tables.

    Args:
        query_states: [batch, num_attention_heads, q_len, head_dim], after RoPE.
        sources: pairs of a KV cache and the table of its query heads.
        starts: int32 [batch], position of the first query.
        num_sink_tokens: S.
        scaling: factor on the dot products.
        output: shape of the queries; written for the heads in the tables only.
        log_sum_exp: fp32 [batch, num_attention_heads, q_len], written; or None.
        packed: division of the queries among sequences; None if each has q_len of them.
    """
    batch, _, q_len, head_dim = query_states.shape
    if packed is not None:
        batch, q_len = packed.counts.shape[0], packed.most
    for states, table in sources:
        if not len(table):
            continue
        tile = tile_sizes(head_dim, query_states.dtype, states.page_size > 0)
        sinks = states.first_slots if states.sink_slots is None else states.sink_slots
        window_kernel[(triton.cdiv(q_len, tile.queries) * len(table), batch)](
            state_descriptor(query_states, tile.queries),
            *key_value_arguments(states, tile.keys),
            output,
            log_sum_exp,
            table.heads,
            table.key_value_heads,
            table.windows,
            starts,
            states.first_slots,
            sinks,
            None if packed is None else packed.offsets,
            None if packed is None else packed.counts,
            q_len,
            len(table),
            table.num_dense,
            head_dim,
            num_sink_tokens,
            scaling * LOG2_E.value,
            *output.stride(),
            *((0, 0) if log_sum_exp is None else log_sum_exp.stride()[:2]),
            PAGE_SIZE=states.page_size,
            STAGES=tile.stages,
            M=tile.queries,
            N=tile.keys,
            D=triton.next_power_of_2(head_dim),
            **tile.launch(),
        )


def block_sparse_attention(
    query_states: Tensor,
    states: KeyValueStates,
    table: HeadTable,
    starts: Tensor,
    lists: BlockLists,
    query_offset: int,
    num_sink_tokens: int,
    scaling: float,
    output: Tensor,
    log_sum_exp: Tensor,
) -> None:
    """Block-sparse attention over listed far keys, added to the result of `window_attention`.

    Arguments are as there; the lists are of the query blocks from index `query_offset` of the call on. Output and
    log-sum-exp are read and written.
    """
    batch, _, q_len, head_dim = query_states.shape
    tile = tile_sizes(head_dim, query_states.dtype, paged=False)
    block_sparse_kernel[(lists.counts.shape[2] * len(table), batch)](
        state_descriptor(query_states, lists.query_block_size),
        state_descriptor(states.keys, lists.block_size),
        state_descriptor(states.values, lists.block_size),
        output,
        log_sum_exp,
        table.heads,
        table.key_value_heads,
        table.windows,
        starts,
        states.first_slots,
        lists.blocks,
        lists.counts,
        q_len,
        len(table),
        query_offset,
        head_dim,
        num_sink_tokens,
        scaling * LOG2_E.value,
        *output.stride(),
        *log_sum_exp.stride()[:2],
        *lists.blocks.stride()[:3],
        *lists.counts.stride()[:3],
        STAGES=tile.stages,
        EDGE=lists.edge_slots,
        M=lists.query_block_size,
        N=lists.block_size,
        D=triton.next_power_of_2(head_dim),
        **tile.launch(),
    )


def tile_sizes(head_dim: int, dtype: torch.dtype, paged: bool) -> TileSizes:
    """Tile sizes for a head_dim and dtype; numbers in comments are of an H100."""
    if dtype == torch.float32:
        return TileSizes(64, 32, 4, 1)
    if paged:
        # Addresses of pages take registers: larger tiles spill.
        return TileSizes(128 if head_dim <= 128 else 64, 32, 8, 2)
    if head_dim <= 64:
        return TileSizes(128, 64, 4, 3)
    if head_dim <= 128:
        # Two programs per multiprocessor: one computes exponentials while the other multiplies
        # (524 TFLOP/s, against 426 without a limit on registers).
        return TileSizes(128, 64, 8, 2, 128)
    return TileSizes(128, 64, 8, 2)


def key_value_arguments(states: States, size: int) -> tuple[Any, ...]:
    """Kernel arguments: keys, key strides, values, value strides, block table, table stride."""
    parts: list[tuple[Any, Any]]
    if isinstance(states, PagedStates):
        parts = [(part, part.stride()[:3]) for part in (states.keys, states.values)]
    else:
        parts = [(state_descriptor(part, size), (0, 0, 0)) for part in (states.keys, states.values)]
    return *parts[0], *parts[1], states.block_table, states.table_stride


def state_descriptor(states: Tensor, size: int) -> TensorDescriptor:
    """TMA descriptor of [batch, heads, length, head_dim] states, for tiles of `size` tokens of one head."""
    return descriptor(states, size, triton.next_power_of_2(states.shape[-1]))

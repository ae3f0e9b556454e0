"""Prefill attention on Hopper GPUs (`hopper_kernel`); same interface as `portable`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from rtpurbo.ops.states import KeyValueStates, PagedStates, States
from rtpurbo.ops.triton.device_functions import LOG2_E
from rtpurbo.ops.triton.heads import HeadTable
from rtpurbo.ops.triton.prefill.hopper_kernel import hopper_kernel
from rtpurbo.ops.triton.prefill.portable import BlockLists, PackedQueries

QUERIES = 128
KEYS = 128
BLOCK = 64
PAGE_SIZES = (16, 32, 64, 128)


@cache
def is_hopper() -> bool:
    """Returns True if the current device is a Hopper GPU."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def supports(query_states: Tensor) -> bool:
    """Returns True if the Hopper kernel supports head_dim and dtype of the queries on this device."""
    return (
        is_hopper()
        and query_states.shape[-1] in (64, 128)
        and query_states.dtype in (torch.float16, torch.bfloat16)
    )


def supports_pages(query_states: Tensor, states: PagedStates) -> bool:
    """Returns True if the Hopper kernel supports these queries and pages."""
    return (
        supports(query_states)
        and query_states.dtype == states.keys.dtype
        and states.page_size in PAGE_SIZES
    )


def _descriptor(states: Tensor, length: int, columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(128, 16, rank=4)
    return TensorDescriptor(
        states, list(states.shape), list(states.stride()), [1, 1, length, columns], layout
    )


def window_attention(
    query_states: Tensor,
    sources: Sequence[tuple[States, HeadTable]],
    starts: Tensor,
    num_sink_tokens: int,
    scaling: float,
    output: Tensor,
    log_sum_exp: Tensor | None,
    packed: PackedQueries | None = None,
    lists: BlockLists | None = None,
    list_start: int = 0,
) -> None:
    """Same as `rtpurbo.ops.triton.prefill.portable.window_attention`, with all sources in one launch.

    There are at most two sources, both with pages or both without. With `lists`, block-sparse attention of the single
    source from query `list_start` on.
    """
    batch, _, q_len, head_dim = query_states.shape
    if packed is not None:
        batch, q_len = packed.counts.shape[0], packed.most
    tiles = triton.cdiv(q_len, QUERIES) if lists is None else lists.counts.shape[2]
    first, last = sources[0][0], sources[-1][0]
    tables = (sources[0][1], sources[-1][1])
    num_heads = sum(len(table) for _, table in sources)
    has_slots = any(states.first_slots is not None for states, _ in sources)
    slots = [part for states in (first, last) for part in _slots(states, starts, has_slots)]
    lse = starts if log_sum_exp is None else log_sum_exp
    hopper_kernel[(tiles * num_heads, batch)](
        _descriptor(query_states, QUERIES, head_dim),
        *(
            _descriptor(part, *_unit(states, head_dim, lists))
            for states in (first, last)
            for part in (states.keys, states.values)
        ),
        output,
        lse,
        *(part for table in tables for part in (table.heads, table.key_value_heads, table.windows)),
        starts,
        *slots,
        starts if lists is None else lists.blocks,
        starts if lists is None else lists.counts,
        *(starts if states.block_table is None else states.block_table for states in (first, last)),
        starts if packed is None else packed.offsets,
        starts if packed is None else packed.counts,
        q_len,
        num_heads,
        len(tables[0]),
        tables[0].num_dense,
        list_start,
        num_sink_tokens,
        scaling * LOG2_E.value,
        *output.stride()[:3],
        *((0, 0) if log_sum_exp is None else log_sum_exp.stride()[:2]),
        0 if lists is None else lists.blocks.shape[-1],
        *(states.table_stride for states in (first, last)),
        *(states.keys.shape[0] for states in (first, last)),
        HAS_SLOTS=has_slots,
        HAS_LSE=log_sum_exp is not None,
        BLOCK_SPARSE=lists is not None,
        EDGE=0 if lists is None else lists.edge_slots,
        PAGE_SIZE=first.page_size,
        PAGE_SIZE_2=last.page_size,
        M=QUERIES,
        N=KEYS,
        D=head_dim,
        STAGES=2,
        BLOCK=BLOCK,
        REGISTERS=240,
        num_warps=4,
        maxnreg=168,
    )


def _unit(states: States, head_dim: int, lists: BlockLists | None) -> tuple[int, int]:
    """Keys and dimensions of one load: a whole step, or half of the dimensions of a listed block or a page."""
    if states.page_size:
        return states.page_size, BLOCK
    return (KEYS, head_dim) if lists is None else (BLOCK, BLOCK)


def _slots(states: States, starts: Tensor, needed: bool) -> tuple[Tensor, Tensor]:
    """Slots of position 0 and of the first sink; placeholders unless `needed`."""
    if not needed:
        return starts, starts
    first = torch.zeros_like(starts) if states.first_slots is None else states.first_slots
    return first, first if states.sink_slots is None else states.sink_slots


def block_sparse_attention(
    query_states: Tensor,
    states: KeyValueStates,
    table: HeadTable,
    starts: Tensor,
    lists: BlockLists,
    list_start: int,
    num_sink_tokens: int,
    scaling: float,
    output: Tensor,
    log_sum_exp: Tensor,
) -> None:
    """Same as `rtpurbo.ops.triton.prefill.portable.block_sparse_attention`, for blocks of 64 keys and 128 queries."""
    window_attention(
        query_states, [(states, table)], starts, num_sink_tokens, scaling, output, log_sum_exp,
        None, lists, list_start,
    )  # fmt: skip

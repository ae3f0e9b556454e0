"""A whole layer through kernels: the meaning is that of `rtpurbo.ops.eager.headwise`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rtpurbo.config import AttentionRule
from rtpurbo.ops.paged import PagedStates
from rtpurbo.ops.sinks import with_sinks
from rtpurbo.ops.states import HeadLayout, KeyValueStates, SelectionStatistics
from rtpurbo.ops.triton.decode.attention import decode_attention
from rtpurbo.ops.triton.heads import (
    EVERYTHING,
    MAX_HEAD_DIM,
    HeadTable,
    query_starts,
    takes_head_dim,
)
from rtpurbo.ops.triton.prefill import hopper, portable
from rtpurbo.ops.triton.prefill.portable import BlockLists
from rtpurbo.ops.triton.prefill.scoring import block_lists, far_keys

# The fastest first.
DENSE_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def headwise_attention(
    query_states: Tensor,
    query_positions: Tensor,
    full: KeyValueStates,
    bounded: KeyValueStates,
    layout: HeadLayout,
    index_queries: Tensor | None,
    rule: AttentionRule,
    *,
    scaling: float,
    statistics: SelectionStatistics | None = None,
    return_log_sum_exp: bool = False,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Retrieval heads over what they select or over everything, local heads over sinks and window.

    Arguments and results as in `rtpurbo.ops.eager.headwise.headwise_attention`; the positions of
    the queries follow from the slots of the keys.
    """
    attend = decode_attention if query_states.shape[2] == 1 else prefill_attention
    return attend(
        query_states,
        full,
        bounded,
        layout,
        index_queries,
        rule,
        scaling=scaling,
        statistics=statistics,
        return_log_sum_exp=return_log_sum_exp,
        sinks=sinks,
    )


def prefill_attention(
    query_states: Tensor,
    full: KeyValueStates | PagedStates,
    bounded: KeyValueStates | PagedStates,
    layout: HeadLayout,
    index_queries: Tensor | None,
    rule: AttentionRule,
    *,
    scaling: float,
    statistics: SelectionStatistics | None = None,
    return_log_sum_exp: bool = False,
    sinks: Tensor | None = None,
    choose_lists: Callable[..., Iterator[tuple[int, BlockLists]]] = block_lists,
) -> tuple[Tensor, Tensor | None]:
    """`headwise_attention` of many rows, the last of each sequence; states may lie in pages.

    Retrieval heads select under `row_peak` if there are index queries for every row, and are dense
    if there are none. What they read then is up to `choose_lists`, which is asked as `block_lists` is.
    """
    batch, heads, q_len, head_dim = query_states.shape
    # Heads side by side in memory, as the output projection wants them.
    output = query_states.new_empty(batch, q_len, heads, head_dim).transpose(1, 2)
    sparse = index_queries is not None and bool(len(layout.retrieval))
    log_sum_exp = None
    wants_log_sum_exp = sparse or return_log_sum_exp or sinks is not None
    if wants_log_sum_exp:
        log_sum_exp = query_states.new_empty(batch, heads, q_len, dtype=torch.float32)
    starts = query_starts(full if layout.full_key_value_heads.numel() else bounded, q_len)
    paged = isinstance(full, PagedStates) or isinstance(bounded, PagedStates)
    kernels = hopper if hopper.suits(query_states) and not paged else portable
    # On Hopper our own kernel is the faster one, and its long tiles run beside the short ones.
    through_library = kernels is portable and not wants_log_sum_exp and _is_plain(full, q_len)

    tables = head_tables(layout, rule)
    groups: list[Any] = [(full, tables["local_full"]), (bounded, tables["local_bounded"])]
    if sparse:
        groups[0] = (full, tables["near_and_local_full"])
    elif not through_library:
        groups[0] = (full, tables["dense_and_local_full"])
    groups = [(states, table) for states, table in groups if len(table)]
    if groups:
        kernels.window_attention(
            query_states, groups, starts, rule.num_sink_tokens, scaling, output, log_sum_exp
        )
    if through_library and len(layout.retrieval):
        assert isinstance(full, KeyValueStates)
        output[:, layout.retrieval.heads] = _dense(query_states, full, layout, scaling)
    if sinks is not None:
        assert log_sum_exp is not None
        # Before selection, which counts the sinks as near.
        shared, log_sum_exp = with_sinks(output, log_sum_exp, sinks)
        output.copy_(shared)
    if sparse:
        assert index_queries is not None
        assert log_sum_exp is not None
        table = tables["near"]
        for row, lists in choose_lists(index_queries, full, table, starts, log_sum_exp, rule):
            listed_attention(
                query_states, full, table, starts, lists, row, rule, scaling, output, log_sum_exp
            )
            if statistics is not None:
                statistics.add_counts(*far_keys(lists, starts, table, row, q_len, rule))
    return output, log_sum_exp if return_log_sum_exp else None


def listed_attention(
    query_states: Tensor,
    states: KeyValueStates | PagedStates,
    table: HeadTable,
    starts: Tensor,
    lists: BlockLists,
    row: int,
    rule: AttentionRule,
    scaling: float,
    output: Tensor,
    log_sum_exp: Tensor,
) -> None:
    """`listed_attention` by the kernel that suits tile and block sizes best."""
    fits = (lists.tile_size, lists.block_size) == (hopper.ROWS, hopper.BLOCK)
    fits &= hopper.suits(query_states) and not isinstance(states, PagedStates)
    kernels: Any = hopper if fits else portable
    kernels.listed_attention(
        query_states, states, table, starts, lists, row,
        rule.num_sink_tokens, scaling, output, log_sum_exp,
    )  # fmt: skip


def head_tables(layout: HeadLayout, rule: AttentionRule) -> dict[str, HeadTable]:
    """The groups of heads that launches serve, made once for a layout and its windows."""
    key = (rule.sliding_window, rule.near_window)
    if key not in layout.derived:
        window, near = key
        tables = {
            "local_full": HeadTable.build(layout.local_full, window),
            "local_bounded": HeadTable.build(layout.local_bounded, window),
            "near": HeadTable.build(layout.retrieval, near),
            "dense": HeadTable.build(layout.retrieval, EVERYTHING),
        }
        for name in ("near", "dense"):
            tables[f"{name}_and_local_full"] = tables[name].followed_by(tables["local_full"])
        layout.derived[key] = tables
    return layout.derived[key]


def _is_plain(states: KeyValueStates | PagedStates, q_len: int) -> bool:
    if isinstance(states, PagedStates):
        return False
    return states.in_order and states.length is None and states.keys.shape[2] == q_len


def _dense(
    query_states: Tensor, states: KeyValueStates, layout: HeadLayout, scaling: float
) -> Tensor:
    """Retrieval heads over every key, by the fastest kernel that PyTorch brings."""
    readers = layout.retrieval.key_value_heads
    with sdpa_kernel(DENSE_KERNELS, set_priority=True):
        return F.scaled_dot_product_attention(
            query_states[:, layout.retrieval.heads],
            states.keys[:, readers],
            states.values[:, readers],
            is_causal=True,
            scale=scaling,
        )


def refusals(
    query_states: Tensor,
    full: KeyValueStates,
    bounded: KeyValueStates,
    index_queries: Tensor | None,
    rule: AttentionRule,
) -> Iterator[str]:
    """Why these kernels cannot serve such a call; nothing if they can."""
    _, _, q_len, head_dim = query_states.shape
    tensors = [query_states, full.keys, full.values, bounded.keys, bounded.values]
    if any(tensor.requires_grad for tensor in tensors) and torch.is_grad_enabled():
        yield "they compute no gradients"
    if not takes_head_dim(head_dim, query_states.dtype):
        yield f"head_dim {head_dim} is not a multiple of 16 bytes, or above {MAX_HEAD_DIM}"
    if any(states.values.shape[-1] != head_dim for states in (full, bounded)):
        yield f"values have other dimensions than the {head_dim} of keys"
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        yield "the last dimension of a tensor is not contiguous"
    used = [full] if q_len == 1 else [full, bounded]
    used = [states for states in used if states.keys.shape[1]]
    if any(not states.in_order and states.first_slots is None for states in used):
        yield "keys lie in no known order (padding elsewhere than on the left)"
    if q_len == 1 or index_queries is None:
        return
    if rule.prefill_mode != "row_peak" or index_queries.shape[2] != q_len:
        yield f"many rows select by '{rule.prefill_mode}'; only 'row_peak' has kernels"
    elif rule.reading == "paper":
        yield "reading 'paper' selects no blocks for tiles"
    sizes = (rule.block_size, rule.query_block_size)
    if any(size & (size - 1) or not 16 <= size <= 128 for size in sizes):
        yield "block_size and query_block_size must be powers of two from 16 to 128"
    if rule.query_block_size // rule.row_stride < 16:
        yield "fewer than 16 rows of a tile are asked (query_block_size / row_stride)"

"""Head-wise attention of a layer with Triton kernels; semantics of `rtpurbo.ops.eager.headwise`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rtpurbo.config import AttentionRule
from rtpurbo.ops.sinks import with_sinks
from rtpurbo.ops.states import AttentionCall, HeadLayout, KeyValueStates
from rtpurbo.ops.triton.decode.attention import decode_step
from rtpurbo.ops.triton.heads import EVERYTHING, MAX_HEAD_DIM, HeadTable, supports_head_dim
from rtpurbo.ops.triton.prefill import hopper, portable
from rtpurbo.ops.triton.prefill.portable import BlockLists
from rtpurbo.ops.triton.prefill.scoring import block_lists, far_keys

# In order of speed.
DENSE_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def headwise_attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Selected or dense attention of retrieval heads, window attention of local heads.

    Results as of `rtpurbo.ops.eager.headwise.headwise_attention`; the positions of the queries are derived from
    the slots of the keys. For dense queries (see `supports_dense_queries`), local heads read every key.
    """
    if call.dense_queries is not None:
        return _with_dense_queries(call, call.dense_queries)
    if call.query_states.shape[2] > 1:
        return prefill_attention(call)
    output, log_sum_exp, _ = decode_step(
        call.query_states,
        call.full,
        call.windowed,
        call.layout,
        call.index_queries,
        call.rule,
        scaling=call.scaling,
        statistics=call.statistics,
        return_log_sum_exp=call.return_log_sum_exp,
        sinks=call.sinks,
    )
    return output, log_sum_exp


def supports_dense_queries(call: AttentionCall) -> bool:
    """Returns whether `headwise_attention` takes these: the last queries of several, of which none selects."""
    rows, num_queries = call.dense_queries, call.query_states.shape[2]
    # A range with a single query would be a decode step.
    return (
        rows is not None
        and call.index_queries is None
        and 1 < rows.start < num_queries - 1
        and rows.stop == num_queries
    )


def _with_dense_queries(call: AttentionCall, rows: slice) -> tuple[Tensor, Tensor | None]:
    """Attention of the queries before the dense ones, and in a second launch, without ends of windows, of these."""
    last = call.query_states.shape[2] - rows.start
    parts = [
        headwise_attention(
            replace(
                call,
                query_states=call.query_states[:, :, queries],
                query_positions=call.query_positions[:, queries],
                full=call.full.tokens(keys),
                windowed=call.windowed.tokens(keys),
                rule=rule,
                dense_queries=None,
            )
        )
        for queries, keys, rule in (
            (slice(0, rows.start), slice(0, -last), call.rule),
            (rows, slice(None), replace(call.rule, sliding_window=EVERYTHING)),
        )
    ]
    output = torch.cat([part.transpose(1, 2) for part, _ in parts], 1).transpose(1, 2)
    sums = [log_sum_exp for _, log_sum_exp in parts if log_sum_exp is not None]
    return output, torch.cat(sums, 2) if sums else None


def prefill_attention(
    call: AttentionCall,
    make_lists: Callable[..., Iterator[tuple[int, BlockLists]]] = block_lists,
) -> tuple[Tensor, Tensor | None]:
    """`headwise_attention` of the last q_len tokens of each sequence.

    Retrieval heads select key blocks (`row_peak`) if there are index queries of every query, and are dense
    without index queries. `make_lists` replaces `block_lists`, for benchmarks.
    """
    query_states, full, windowed, layout = call.query_states, call.full, call.windowed, call.layout
    index_queries, rule, sinks = call.index_queries, call.rule, call.sinks
    batch, heads, q_len, head_dim = query_states.shape
    # Laid out as [batch, q_len, heads, head_dim], which the output projection reads without a copy.
    output = query_states.new_empty(batch, q_len, heads, head_dim).transpose(1, 2)
    sparse = index_queries is not None and bool(len(layout.retrieval))
    log_sum_exp = None
    wants_log_sum_exp = sparse or call.return_log_sum_exp or sinks is not None
    if wants_log_sum_exp:
        log_sum_exp = query_states.new_empty(batch, heads, q_len, dtype=torch.float32)
    starts = (full if layout.full_key_value_heads.numel() else windowed).query_starts(q_len)
    kernels: Any = hopper if hopper.supports(query_states) else portable
    is_plain = full.in_order and full.length is None and full.keys.shape[2] == q_len
    # On Hopper the kernel is faster than PyTorch's, and dense heads run in the same launch as local ones.
    uses_sdpa = kernels is portable and not wants_log_sum_exp and is_plain

    tables = head_tables(layout, rule)
    groups = [(full, tables["local_full"]), (windowed, tables["local_windowed"])]
    if sparse:
        groups[0] = (full, tables["near_and_local_full"])
    elif not uses_sdpa:
        groups[0] = (full, tables["dense_and_local_full"])
    groups = [(states, table) for states, table in groups if len(table)]
    if groups:
        kernels.window_attention(
            query_states, groups, starts, rule.num_sink_tokens, call.scaling, output, log_sum_exp
        )
    if uses_sdpa and len(layout.retrieval):
        output[:, layout.retrieval.heads] = _dense(query_states, full, layout, call.scaling)
    if sinks is not None:
        assert log_sum_exp is not None
        # Before the selection, whose near mass includes the sinks.
        shared, log_sum_exp = with_sinks(output, log_sum_exp, sinks)
        output.copy_(shared)
    if sparse:
        assert index_queries is not None
        assert log_sum_exp is not None
        if (rule.query_block_size, rule.block_size) != (hopper.QUERIES, hopper.BLOCK):
            kernels = portable
        table = tables["near"]
        for query_offset, lists in make_lists(
            index_queries, full, table, starts, log_sum_exp, rule
        ):
            kernels.block_sparse_attention(
                query_states, full, table, starts, lists, query_offset,
                rule.num_sink_tokens, call.scaling, output, log_sum_exp,
            )  # fmt: skip
            if call.statistics is not None:
                counts = far_keys(lists, starts, table, query_offset, q_len, rule)
                call.statistics.add_counts(*counts)
    return output, log_sum_exp if call.return_log_sum_exp else None


def head_tables(layout: HeadLayout, rule: AttentionRule) -> dict[str, HeadTable]:
    """Head tables of the launches, cached per layout and windows."""
    key = (rule.sliding_window, rule.near_window)
    if key not in layout.derived:
        window, near = key
        tables = {
            "local_full": HeadTable.build(layout.local_full, window),
            "local_windowed": HeadTable.build(layout.local_windowed, window),
            "near": HeadTable.build(layout.retrieval, near),
            "dense": HeadTable.build(layout.retrieval, EVERYTHING),
        }
        for name in ("near", "dense"):
            tables[f"{name}_and_local_full"] = tables[name].followed_by(tables["local_full"])
        layout.derived[key] = tables
    return layout.derived[key]


def _dense(
    query_states: Tensor, states: KeyValueStates, layout: HeadLayout, scaling: float
) -> Tensor:
    """Dense retrieval heads, with the fastest kernel of PyTorch."""
    kv_head_index = layout.retrieval.key_value_heads
    with sdpa_kernel(DENSE_KERNELS, set_priority=True):
        return F.scaled_dot_product_attention(
            query_states[:, layout.retrieval.heads],
            states.keys[:, kv_head_index],
            states.values[:, kv_head_index],
            is_causal=True,
            scale=scaling,
        )


def unsupported_reasons(call: AttentionCall) -> Iterator[str]:
    """Yields the reasons for which the kernels do not support a call."""
    query_states, full, windowed, rule = call.query_states, call.full, call.windowed, call.rule
    _, _, q_len, head_dim = query_states.shape
    tensors = [query_states, full.keys, full.values, windowed.keys, windowed.values]
    if any(tensor.requires_grad for tensor in tensors) and torch.is_grad_enabled():
        yield "the kernels compute no gradients"
    if not supports_head_dim(head_dim, query_states.dtype):
        yield f"head_dim {head_dim} is not a multiple of 16 bytes, or above {MAX_HEAD_DIM}"
    if any(states.values.shape[-1] != head_dim for states in (full, windowed)):
        yield f"values have another head_dim than the keys ({head_dim})"
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        yield "the last dimension of a tensor is not contiguous"
    used = [full] if q_len == 1 else [full, windowed]
    used = [states for states in used if states.keys.shape[1]]
    if any(not states.in_order and states.first_slots is None for states in used):
        yield "the order of the keys is unknown (padding other than on the left)"
    if q_len == 1 or call.index_queries is None:
        return
    if rule.prefill_mode != "row_peak" or call.index_queries.shape[2] != q_len:
        yield f"prefill_mode '{rule.prefill_mode}' has no kernels: only 'row_peak' has"
    elif rule.reading == "paper":
        yield "reading 'paper' has no block selection"
    sizes = (rule.block_size, rule.query_block_size)
    if any(size & (size - 1) or not 16 <= size <= 128 for size in sizes):
        yield "block_size and query_block_size must be powers of two from 16 to 128"
    if rule.query_block_size // rule.row_stride < 16:
        yield "fewer than 16 queries of a block are scored (query_block_size / row_stride)"

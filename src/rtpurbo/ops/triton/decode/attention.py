"""A decoding step of a whole layer: one query token a sequence, in four launches.

1. `read`: sinks and window of every head; and of the far keys, the indexer's scores, and how many
   have which;
2. `select`: the lowest score to read that follows from this, and the keys from there on;
3. `far`: attention over these;
4. `merge`: the parts of each head become one.

What the first one counts in is zeros before, and the last one leaves zeros there; where the caller
keeps no counters, a fill precedes them.

B sequences, H query heads, R retrieval heads, D head_dim, I index_dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.paged import PagedStates
from rtpurbo.ops.states import HeadLayout, KeyValueStates, SelectionStatistics
from rtpurbo.ops.triton.decode.launch import merge, read, read_far, select
from rtpurbo.ops.triton.decode.states import FullStates, Selection
from rtpurbo.ops.triton.heads import MAX_HEAD_DIM

MAX_BLOCK_SIZE = 1024


def decode_attention(
    query_states: Tensor,
    full: KeyValueStates | PagedStates,
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
    """Retrieval heads over selected keys, local heads over sinks and window, for one query token.

    It equals `rtpurbo.ops.eager.headwise.headwise_attention` but for one thing: the selection is
    rounded up to a whole level of scores (`levels`, `threshold`).

    Args:
        query_states: [B, H, 1, D], after RoPE; the last token of each sequence.
        full: states of the KV heads kept whole, with index keys for the retrieval heads. Where a token
            lies is told by `first_slots`, and how many slots are in use by `length`; `positions` are
            not read. What is not in use may hold anything. Index keys may be in float8_e4m3fn: half
            as much to read, for scores that are some 3 % off.
        bounded: states of the other KV heads, found by their `positions`.
        layout: which head does what.
        index_queries: [B, R, 1, I]; None if no head retrieves.
        rule: windows and selection.
        scaling: factor on the dot products.
        statistics: counts what retrieval heads select, if given; this waits for the GPU.
        return_log_sum_exp: whether to return it.
        sinks: learned sinks [H], which the selection counts as near.

    Returns:
        Output [B, H, 1, D] and the log-sum-exp [B, H, 1] or None.
    """
    output, log_sum_exp, _ = run_step(
        query_states,
        full,
        bounded,
        layout,
        index_queries,
        rule,
        scaling,
        statistics,
        return_log_sum_exp,
        sinks,
    )
    return output, log_sum_exp


def run_step(
    query_states: Tensor,
    full: KeyValueStates | PagedStates,
    bounded: KeyValueStates,
    layout: HeadLayout,
    index_queries: Tensor | None,
    rule: AttentionRule,
    scaling: float,
    statistics: SelectionStatistics | None = None,
    return_log_sum_exp: bool = False,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Selection | None]:
    """A step and what it selected: None if everything far is read, or if no head retrieves."""
    states = _full_states(full, query_states.shape[0])
    _check(query_states, states, bounded, layout, index_queries, rule)
    queries = query_states if query_states.stride(-1) == 1 else query_states.contiguous()
    if index_queries is not None and index_queries.stride(-1) != 1:
        index_queries = index_queries.contiguous()
    selection = None
    with torch.cuda.device_of(queries):
        near, index = read(queries, states, bounded, layout, index_queries, rule, scaling)
        if sinks is not None:
            near = near.with_sinks(sinks)
        far = near
        if len(layout.retrieval):
            if rule.top_p < 1:
                selection = select(queries, states, layout, rule, near, index)
            far = read_far(queries, states, layout, rule, scaling, selection)
        counters = states.counters if index.histogram is states.counters else None
        output, log_sum_exp = merge(queries, layout, near, far, counters, return_log_sum_exp)
    if statistics is not None and len(layout.retrieval):
        _count(statistics, states, rule, selection, queries.shape[0], len(layout.retrieval))
    return output, log_sum_exp, selection


def _full_states(full: KeyValueStates | PagedStates, batch: int) -> FullStates:
    if isinstance(full, PagedStates):
        return FullStates.of_pages(full)
    if full.in_order or full.first_slots is not None:
        return FullStates.of_states(full)
    if full.keys.shape[1]:
        raise ValueError(
            "keys lie in no known order: a decoding step needs first_slots or in_order."
        )
    # Without a full KV head, all that is wanted of these states is the position of the query.
    length = torch.full_like(full.positions[:1, 0], full.keys.shape[2])
    if full.length is not None:
        length = full.length.long()
    positions = full.positions.expand(batch, -1).gather(1, (length - 1).expand(batch, 1))[:, 0]
    first_slots = (length - 1 - positions).to(torch.int32)
    return FullStates.of_states(replace(full, first_slots=first_slots))


def _check(
    query_states: Tensor,
    full: FullStates,
    bounded: KeyValueStates,
    layout: HeadLayout,
    index_queries: Tensor | None,
    rule: AttentionRule,
) -> None:
    head_dim = query_states.shape[-1]
    if query_states.shape[2] != 1:
        raise ValueError(
            f"a decoding step has one query token a sequence, not {query_states.shape[2]}."
        )
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}, but the kernels take at most {MAX_HEAD_DIM}.")
    if rule.granularity == "block" and rule.block_size > MAX_BLOCK_SIZE:
        raise ValueError(
            f"block_size is {rule.block_size}, but the kernels take at most {MAX_BLOCK_SIZE}."
        )
    for states in (full.keys, full.values, bounded.keys, bounded.values):
        if states.numel() and (states.shape[-1] != head_dim or states.stride(-1) != 1):
            raise ValueError(
                f"keys and values must have {head_dim} contiguous elements a token, as queries have; "
                f"got {states.shape[-1]} with stride {states.stride(-1)}."
            )
    if len(layout.retrieval) and (index_queries is None or full.index_keys is None):
        raise ValueError("retrieval heads need index queries and index keys.")


def _count(
    statistics: SelectionStatistics,
    full: FullStates,
    rule: AttentionRule,
    selection: Selection | None,
    batch: int,
    num_retrieval: int,
) -> None:
    """Adds what the step read to `statistics`."""
    positions = torch.arange(full.capacity, device=full.keys.device)
    far = positions <= full.query_positions(batch)[:, None] - rule.near_window
    far &= positions >= rule.num_sink_tokens
    far = far[:, None, None]
    if selection is None:
        selected = far.expand(-1, num_retrieval, -1, -1)
    else:
        selected = selection.keys(full.capacity)[:, :, None] & far
    statistics.add(far, selected)

"""Selections of the last queries as bit masks, computed by the specification in chunks of queries."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.eager.attend import attention_logits
from rtpurbo.ops.eager.selection import estimated_logits, index_scores, select_per_query
from rtpurbo.ops.eager.visibility import causal_mask, near_mask
from rtpurbo.ops.states import (
    HeadLayout,
    KeyValueStates,
    SelectionQueries,
    SelectionStatistics,
    index_key_heads,
)

BITS = 32
# Limit on the pairs of queries and keys of one chunk.
MAX_PAIRS = 2**24


@torch.no_grad()
def selected_bits(
    query_states: Tensor,
    query_positions: Tensor,
    states: KeyValueStates,
    layout: HeadLayout,
    index_queries: Tensor,
    rule: AttentionRule,
    scaling: float,
    num_queries: int,
    num_keys: int,
    statistics: SelectionStatistics | None = None,
) -> Tensor:
    """Far keys selected by the last queries.

    Args:
        query_states: [batch, num_attention_heads, q_len, head_dim], after RoPE.
        query_positions: int64 [batch, q_len].
        states: of the full KV heads, with index keys.
        layout: query heads by kind.
        index_queries: [batch, num_retrieval_heads, selecting queries, index_dim] of the last queries.
        rule: selection.
        scaling: factor on the dot products.
        num_queries: queries of the result, at least the selecting ones; the others select nothing.
        num_keys: keys of the result, at least those of the states, a multiple of `BITS`.
        statistics: accumulates the selected keys.

    Returns:
        int32 [batch, num_attention_heads, num_queries, num_keys / BITS]; bit b of word w is key BITS * w + b.
        Local heads select nothing.
    """
    assert states.index_keys is not None
    batch, num_heads, _, _ = query_states.shape
    retrieval, selecting = layout.retrieval, index_queries.shape[2]
    queries = query_states[:, retrieval.heads, -selecting:]
    positions = query_positions[:, -selecting:]
    keys = states.keys[:, retrieval.key_value_heads]
    key_heads = index_key_heads(states.index_keys, states.keys.shape[1], retrieval.key_value_heads)
    length = keys.shape[2]
    words = queries.new_zeros(batch, num_heads, num_queries, num_keys // BITS, dtype=torch.int32)
    queries_at_once = max(1, MAX_PAIRS // (batch * len(retrieval) * length))
    for start in range(0, selecting, queries_at_once):
        chunk = slice(start, min(start + queries_at_once, selecting))
        near = near_mask(
            positions[:, chunk], states.positions, rule.near_window, rule.num_sink_tokens
        )
        far = causal_mask(positions[:, chunk], states.positions) & ~near
        chunk_queries = SelectionQueries(
            queries[:, :, chunk],
            keys,
            positions[:, chunk],
            states.positions,
            attention_logits(queries[:, :, chunk], keys, scaling),
            near,
            far,
            partial(index_scores, index_queries[:, :, chunk], states.index_keys, key_heads),
        )
        estimate = estimated_logits(
            rule.reading, chunk_queries.logits, chunk_queries.score_index(), near, far
        )
        # Keys are in order, so their number gives the number of blocks.
        num_blocks = -(-length // rule.block_size)
        selected = select_per_query(rule, estimate, near, far, states.positions, num_blocks)
        if statistics is not None:
            statistics.add_queries(chunk_queries, selected)
        words[:, retrieval.heads, chunk] = packed_bits(selected, num_keys)
    return words


def packed_bits(mask: Tensor, num_keys: int) -> Tensor:
    """Packs a mask [..., keys], padded to `num_keys`, into int32 words [..., num_keys / BITS]."""
    padded = torch.nn.functional.pad(mask, (0, num_keys - mask.shape[-1]))
    shifts = torch.arange(BITS, device=mask.device, dtype=torch.int32)
    # The bits are disjoint, so their sum is their union; the last one is the sign.
    return (padded.unflatten(-1, (-1, BITS)).int() << shifts).sum(-1, dtype=torch.int32)

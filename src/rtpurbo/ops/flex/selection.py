"""Selections of the last queries as bit masks, computed by the specification in chunks of queries."""

from __future__ import annotations

import torch
from torch import Tensor

from rtpurbo.ops.eager.retrieval import select_by_rule, selection_queries
from rtpurbo.ops.eager.selection import select_per_query
from rtpurbo.ops.states import AttentionCall, index_key_heads

BITS = 32
# Limit on the pairs of queries and keys of one chunk.
MAX_PAIRS = 2**24


@torch.no_grad()
def selected_bits(call: AttentionCall, num_queries: int, num_keys: int) -> Tensor:
    """Far keys selected by the last queries.

    Args:
        call: of a whole sequence, with index queries.
        num_queries: queries of the result, at least the selecting ones; the others select nothing.
        num_keys: keys of the result, at least those of the states, a multiple of `BITS`.

    Returns:
        int32 [batch, num_attention_heads, num_queries, num_keys / BITS]; bit b of word w is key BITS * w + b.
        Local heads select nothing.
    """
    states, index_queries, retrieval = call.full, call.index_queries, call.layout.retrieval
    assert states.index_keys is not None
    assert index_queries is not None
    batch, num_heads, _, _ = call.query_states.shape
    selecting = index_queries.shape[2]
    queries = call.query_states[:, retrieval.heads, -selecting:]
    positions = call.query_positions[:, -selecting:]
    keys = states.keys[:, retrieval.key_value_heads]
    key_heads = index_key_heads(states.index_keys, states.keys.shape[1], retrieval.key_value_heads)
    length = keys.shape[2]
    # Keys are in order, so their number gives the number of blocks.
    num_blocks = -(-length // call.rule.block_size)
    words = queries.new_zeros(batch, num_heads, num_queries, num_keys // BITS, dtype=torch.int32)
    queries_at_once = max(1, MAX_PAIRS // (batch * len(retrieval) * length))
    for start in range(0, selecting, queries_at_once):
        chunk = slice(start, min(start + queries_at_once, selecting))
        chunk_queries = selection_queries(
            queries[:, :, chunk], keys, positions[:, chunk], states,
            index_queries[:, :, chunk], key_heads, call.rule, call.scaling,
        )  # fmt: skip
        selected = select_by_rule(call.rule, chunk_queries, None, select_per_query, num_blocks)
        if call.statistics is not None:
            call.statistics.add_queries(chunk_queries, selected)
        words[:, retrieval.heads, chunk] = packed_bits(selected, num_keys)
    return words


def packed_bits(mask: Tensor, num_keys: int) -> Tensor:
    """Packs a mask [..., keys], padded to `num_keys`, into int32 words [..., num_keys / BITS]."""
    padded = torch.nn.functional.pad(mask, (0, num_keys - mask.shape[-1]))
    shifts = torch.arange(BITS, device=mask.device, dtype=torch.int32)
    # The bits are disjoint, so their sum is their union; the last one is the sign.
    return (padded.unflatten(-1, (-1, BITS)).int() << shifts).sum(-1, dtype=torch.int32)

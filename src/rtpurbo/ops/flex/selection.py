"""What the last rows select, a bit a key: made by the specification's own rules, a few rows at a time."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.eager.attend import attention_logits
from rtpurbo.ops.eager.selection import estimated_logits, index_scores, select_for_rows
from rtpurbo.ops.eager.visibility import causal_mask, near_mask
from rtpurbo.ops.states import (
    HeadLayout,
    KeyValueStates,
    SelectionRows,
    SelectionStatistics,
    index_key_heads,
)

BITS = 32
# Scores of so many pairs of rows and keys are looked at together.
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
    num_rows: int,
    num_keys: int,
    statistics: SelectionStatistics | None = None,
) -> Tensor:
    """The far keys that the last rows select.

    Args:
        query_states: [batch, num_attention_heads, q_len, head_dim], after RoPE.
        query_positions: int64 [batch, q_len].
        states: of the full KV heads, with index keys.
        layout: which head does what.
        index_queries: [batch, num_retrieval_heads, selecting rows, index_dim] of the last rows.
        rule: what to select.
        scaling: factor on the dot products.
        num_rows: rows of the result, at least the selecting ones; the others select nothing.
        num_keys: keys of the result, at least those there are, a multiple of `BITS`.
        statistics: counts what is read, if given.

    Returns:
        int32 [batch, num_attention_heads, num_rows, num_keys / BITS]; bit b of word w is key
        BITS * w + b. Heads that do not retrieve select nothing.
    """
    assert states.index_keys is not None
    batch, num_heads, _, _ = query_states.shape
    retrieval, selecting = layout.retrieval, index_queries.shape[2]
    queries = query_states[:, retrieval.heads, -selecting:]
    positions = query_positions[:, -selecting:]
    keys = states.keys[:, retrieval.key_value_heads]
    key_heads = index_key_heads(states.index_keys, states.keys.shape[1], retrieval.key_value_heads)
    length = keys.shape[2]
    words = queries.new_zeros(batch, num_heads, num_rows, num_keys // BITS, dtype=torch.int32)
    rows_at_once = max(1, MAX_PAIRS // (batch * len(retrieval) * length))
    for start in range(0, selecting, rows_at_once):
        chunk = slice(start, min(start + rows_at_once, selecting))
        near = near_mask(
            positions[:, chunk], states.positions, rule.near_window, rule.num_sink_tokens
        )
        far = causal_mask(positions[:, chunk], states.positions) & ~near
        rows = SelectionRows(
            queries[:, :, chunk],
            keys,
            positions[:, chunk],
            states.positions,
            attention_logits(queries[:, :, chunk], keys, scaling),
            near,
            far,
            partial(index_scores, index_queries[:, :, chunk], states.index_keys, key_heads),
        )
        estimate = estimated_logits(rule.reading, rows.logits, rows.score_index(), near, far)
        # Keys lie in order, so their number tells how many blocks there are.
        num_blocks = -(-length // rule.block_size)
        selected = select_for_rows(rule, estimate, near, far, states.positions, num_blocks)
        if statistics is not None:
            statistics.add_rows(rows, selected)
        words[:, retrieval.heads, chunk] = packed_bits(selected, num_keys)
    return words


def packed_bits(mask: Tensor, num_keys: int) -> Tensor:
    """A mask [..., keys], with zeros up to `num_keys`, as int32 words [..., num_keys / BITS]."""
    padded = torch.nn.functional.pad(mask, (0, num_keys - mask.shape[-1]))
    places = torch.arange(BITS, device=mask.device, dtype=torch.int32)
    # Each bit stands for itself alone, so that sums are unions; the last one is the sign.
    return (padded.unflatten(-1, (-1, BITS)).int() << places).sum(-1, dtype=torch.int32)

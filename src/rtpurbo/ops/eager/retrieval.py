"""Attention of retrieval heads: sinks, window, and what the token indexer selects."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.eager.attend import attend_to_logits, attention_logits
from rtpurbo.ops.eager.selection import (
    estimated_logits,
    index_scores,
    select_for_rows,
    select_for_tiles,
)
from rtpurbo.ops.eager.visibility import causal_mask, near_mask, query_chunks
from rtpurbo.ops.sinks import with_sink_column
from rtpurbo.ops.states import (
    KeyValueStates,
    SelectionRows,
    SelectionStatistics,
    Selector,
    index_key_heads,
)


def retrieval_attention(
    query_states: Tensor,
    query_positions: Tensor,
    states: KeyValueStates,
    key_value_heads: Tensor,
    index_queries: Tensor,
    rule: AttentionRule,
    *,
    scaling: float,
    statistics: SelectionStatistics | None = None,
    return_log_sum_exp: bool = False,
    selector: Selector | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Exact attention over near keys and selected far ones; the selection gets no gradient.

    Args:
        query_states: [batch, heads, q_len, head_dim], after RoPE.
        query_positions: int64 [batch, q_len], -1 for padding.
        states: keys, values and index keys of the heads' KV heads.
        key_value_heads: int64 [heads], which KV head of `states` each query head reads.
        index_queries: [batch, heads, q_len, index_dim].
        rule: what to select; with `prefill_mode` `row_share` or `row_peak` tiles of rows share a list.
        scaling: factor on the dot products.
        statistics: counts what is read, if given.
        return_log_sum_exp: whether to return it.
        selector: chooses the far keys instead of the rule, each row its own.
        sinks: learned sinks [heads], whose mass the selection counts as near; the output is without them.

    Returns:
        Output [batch, heads, q_len, head_dim] and the log-sum-exp [batch, heads, q_len] or None.

    Raises:
        ValueError: the states hold no index keys, or of another number of heads.
    """
    if states.index_keys is None:
        raise ValueError("retrieval_attention needs states with index keys.")
    key_heads = index_key_heads(states.index_keys, states.keys.shape[1], key_value_heads)
    share_lists = rule.prefill_mode in ("row_share", "row_peak") and query_states.shape[2] > 1
    keys, values = states.keys[:, key_value_heads], states.values[:, key_value_heads]
    elements_per_query = query_states.shape[0] * query_states.shape[1] * keys.shape[2]
    outputs, log_sum_exps = [], []
    for chunk in query_chunks(query_states.shape[2], elements_per_query, rule.query_block_size):
        positions = query_positions[:, chunk]
        near = near_mask(positions, states.positions, rule.near_window, rule.num_sink_tokens)
        far = causal_mask(positions, states.positions) & ~near
        logits = attention_logits(query_states[:, :, chunk], keys, scaling)
        with torch.no_grad():
            rows = SelectionRows(
                query_states[:, :, chunk],
                keys,
                positions,
                states.positions,
                logits.detach(),
                near,
                far,
                partial(index_scores, index_queries[:, :, chunk], states.index_keys, key_heads),
            )
            if selector is not None:
                selected = selector(rows) & far
            else:
                rows_after = query_states.shape[2] - chunk.stop if share_lists else None
                selected = _select_by_rule(rule, rows, rows_after, sinks)
            if statistics is not None:
                statistics.add_rows(rows, selected)
        output, log_sum_exp = attend_to_logits(logits, values, near | selected)
        outputs.append(output)
        log_sum_exps.append(log_sum_exp)
    return torch.cat(outputs, 2), torch.cat(log_sum_exps, 2) if return_log_sum_exp else None


def _select_by_rule(
    rule: AttentionRule, rows: SelectionRows, rows_after: int | None, sinks: Tensor | None
) -> Tensor:
    """The far keys by the indexer; `rows_after` rows of the call follow, None if none share a list."""
    estimate = estimated_logits(rule.reading, rows.logits, rows.score_index(), rows.near, rows.far)
    _, estimate, near, far = with_sink_column(estimate, estimate, rows.near, rows.far, sinks)
    # A learned sink counts to the first block.
    key_positions = F.pad(rows.key_positions, (0 if sinks is None else 1, 0))
    if rows_after is None:
        selected = select_for_rows(rule, estimate, near, far, key_positions)
    else:
        selected = select_for_tiles(rule, estimate, near, far, key_positions, rows_after)
    return selected if sinks is None else selected[..., 1:]

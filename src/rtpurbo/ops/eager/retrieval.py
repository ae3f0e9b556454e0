"""Attention of retrieval heads: sinks, window, and far keys selected by the token indexer."""

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
    select_per_query,
    select_per_query_block,
)
from rtpurbo.ops.eager.visibility import causal_mask, near_mask, query_chunks
from rtpurbo.ops.sinks import with_sink_column
from rtpurbo.ops.states import (
    KeyValueStates,
    SelectionQueries,
    SelectionStatistics,
    Selector,
    check_states,
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
    """Exact attention over near and selected far keys; the selection gets no gradient.

    Args:
        query_states: [batch, heads, q_len, head_dim], after RoPE.
        query_positions: int64 [batch, q_len], -1 for padding.
        states: keys, values and index keys of the heads' KV heads.
        key_value_heads: int64 [heads], KV head index of each query head in `states`.
        index_queries: [batch, heads, q_len, index_dim].
        rule: selection; with `prefill_mode` `row_share` or `row_peak`, query blocks share a block list.
        scaling: factor on the dot products.
        statistics: accumulates the selected keys.
        return_log_sum_exp: also return the log-sum-exp.
        selector: selects the far keys of each query in place of the rule.
        sinks: learned sinks [heads], part of the near mass of the selection; not part of the output.

    Returns:
        Output [batch, heads, q_len, head_dim] and the log-sum-exp [batch, heads, q_len] or None.

    Raises:
        ValueError: the states have no index keys, or index keys of another number of heads.
    """
    check_states(query_states, query_positions, states)
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
            queries = SelectionQueries(
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
                selected = selector(queries) & far
            else:
                queries_after = query_states.shape[2] - chunk.stop if share_lists else None
                selected = _select_by_rule(rule, queries, queries_after, sinks)
            if statistics is not None:
                statistics.add_queries(queries, selected)
        output, log_sum_exp = attend_to_logits(logits, values, near | selected)
        outputs.append(output)
        log_sum_exps.append(log_sum_exp)
    return torch.cat(outputs, 2), torch.cat(log_sum_exps, 2) if return_log_sum_exp else None


def _select_by_rule(
    rule: AttentionRule, queries: SelectionQueries, queries_after: int | None, sinks: Tensor | None
) -> Tensor:
    """Far keys selected by the indexer; `queries_after`: later queries of the call, None without block lists."""
    estimate = estimated_logits(
        rule.reading, queries.logits, queries.score_index(), queries.near, queries.far
    )
    _, estimate, near, far = with_sink_column(estimate, estimate, queries.near, queries.far, sinks)
    # The learned sink belongs to the first block.
    key_positions = F.pad(queries.key_positions, (0 if sinks is None else 1, 0))
    if queries_after is None:
        selected = select_per_query(rule, estimate, near, far, key_positions)
    else:
        selected = select_per_query_block(rule, estimate, near, far, key_positions, queries_after)
    return selected if sinks is None else selected[..., 1:]

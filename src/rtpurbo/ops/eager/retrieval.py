"""Attention of retrieval heads: sinks, window, and far keys selected by the token indexer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.eager.attend import attend_to_logits, attention_logits, joined
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
    parts: list[tuple[Tensor, Tensor | None]] = []
    for chunk in query_chunks(query_states.shape[2], elements_per_query, rule.query_block_size):
        queries = selection_queries(
            query_states[:, :, chunk], keys, query_positions[:, chunk], states,
            index_queries[:, :, chunk], key_heads, rule, scaling,
        )  # fmt: skip
        logits = queries.logits
        with torch.no_grad():
            queries = replace(queries, logits=logits.detach())
            if selector is not None:
                selected = selector(queries) & queries.far
            elif share_lists:
                queries_after = query_states.shape[2] - chunk.stop
                selected = select_by_rule(
                    rule, queries, sinks, select_per_query_block, queries_after
                )
            else:
                selected = select_by_rule(rule, queries, sinks, select_per_query)
            if statistics is not None:
                statistics.add_queries(queries, selected)
        output, log_sum_exp = attend_to_logits(logits, values, queries.near | selected)
        parts.append((output, log_sum_exp if return_log_sum_exp else None))
    return joined(parts, 2)


def selection_queries(
    query_states: Tensor,
    key_states: Tensor,
    query_positions: Tensor,
    states: KeyValueStates,
    index_queries: Tensor,
    key_heads: Tensor | None,
    rule: AttentionRule,
    scaling: float,
) -> SelectionQueries:
    """Logits and masks of queries of retrieval heads; `key_states` are those of `states` for each query head."""
    near = near_mask(query_positions, states.positions, rule.near_window, rule.num_sink_tokens)
    far = causal_mask(query_positions, states.positions) & ~near
    logits = attention_logits(query_states, key_states, scaling)
    assert states.index_keys is not None
    score_index = partial(index_scores, index_queries, states.index_keys, key_heads)
    return SelectionQueries(
        query_states, key_states, query_positions, states.positions, logits, near, far, score_index
    )


def select_by_rule(
    rule: AttentionRule,
    queries: SelectionQueries,
    sinks: Tensor | None,
    select: Callable[..., Tensor],
    *options: int,
) -> Tensor:
    """Far keys selected by the indexer with a function of `selection`."""
    estimate = estimated_logits(
        rule.reading, queries.logits, queries.score_index(), queries.near, queries.far
    )
    _, estimate, near, far = with_sink_column(estimate, estimate, queries.near, queries.far, sinks)
    # The learned sink belongs to the first block.
    key_positions = F.pad(queries.key_positions, (0 if sinks is None else 1, 0))
    selected = select(rule, estimate, near, far, key_positions, *options)
    return selected if sinks is None else selected[..., 1:]

"""Attention of a layer by kind of head, with the outputs in head order."""

from __future__ import annotations

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.eager.local import causal_attention, local_attention
from rtpurbo.ops.eager.retrieval import retrieval_attention
from rtpurbo.ops.sinks import with_sinks
from rtpurbo.ops.states import HeadLayout, KeyValueStates, SelectionStatistics, Selector


def headwise_attention(
    query_states: Tensor,
    query_positions: Tensor,
    full: KeyValueStates,
    windowed: KeyValueStates,
    layout: HeadLayout,
    index_queries: Tensor | None,
    rule: AttentionRule,
    *,
    scaling: float,
    statistics: SelectionStatistics | None = None,
    return_log_sum_exp: bool = False,
    selector: Selector | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Retrieval heads over selected keys, local heads over sinks and window.

    `rtpurbo.ops.headwise_attention` also takes `dense_queries`, for which local heads read every key; see
    `rtpurbo.ops.eager.dense_queries`.

    The last queries, which have index queries (see `rule.num_selecting_queries`), select in retrieval heads; the
    queries before them are dense.

    Args:
        query_states: [batch, num_attention_heads, q_len, head_dim], after RoPE.
        query_positions: int64 [batch, q_len], -1 for padding.
        full: states of the full KV heads, with index keys of the retrieval heads.
        windowed: states of the windowed KV heads, at least sinks and the last W keys.
        layout: query heads by kind.
        index_queries: [batch, num_retrieval_heads, selecting queries, index_dim] of the last queries, or
            None if no query selects.
        rule: windows and selection.
        scaling: factor on the dot products.
        statistics: accumulates the selected keys.
        return_log_sum_exp: also return the log-sum-exp.
        selector: selects the far keys in place of the rule.
        sinks: learned sinks [num_attention_heads] (gpt-oss): logits in the denominator of every softmax and
            in the near mass of the selection.

    Returns:
        Output [batch, num_attention_heads, q_len, head_dim] and the log-sum-exp
        [batch, num_attention_heads, q_len] or None.
    """
    parts: list[tuple[Tensor, Tensor | None]] = []
    wants_log_sum_exp, return_log_sum_exp = (
        return_log_sum_exp,
        return_log_sum_exp or sinks is not None,
    )
    if len(layout.retrieval):
        parts.append(
            _retrieval_heads(
                query_states[:, layout.retrieval.heads],
                query_positions,
                full,
                layout.retrieval.key_value_heads,
                index_queries,
                rule,
                scaling,
                statistics,
                return_log_sum_exp,
                selector,
                None if sinks is None else sinks[layout.retrieval.heads],
            )
        )
    for group, states in ((layout.local_full, full), (layout.local_windowed, windowed)):
        if len(group):
            parts.append(
                local_attention(
                    query_states[:, group.heads],
                    query_positions,
                    states,
                    group.key_value_heads,
                    sliding_window=rule.sliding_window,
                    num_sink_tokens=rule.num_sink_tokens,
                    scaling=scaling,
                    return_log_sum_exp=return_log_sum_exp,
                )
            )
    output = torch.cat([part for part, _ in parts], 1)[:, layout.order]
    if not return_log_sum_exp:
        return output, None
    log_sum_exp = torch.cat([part for _, part in parts if part is not None], 1)[:, layout.order]
    if sinks is not None:
        output, log_sum_exp = with_sinks(output, log_sum_exp, sinks)
    return output, log_sum_exp if wants_log_sum_exp else None


def _retrieval_heads(
    queries: Tensor,
    query_positions: Tensor,
    states: KeyValueStates,
    kv_head_index: Tensor,
    index_queries: Tensor | None,
    rule: AttentionRule,
    scaling: float,
    statistics: SelectionStatistics | None,
    return_log_sum_exp: bool,
    selector: Selector | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Selected attention of the last queries, which have index queries; dense attention of the others."""
    num_selecting = 0 if index_queries is None else index_queries.shape[2]
    num_dense = queries.shape[2] - num_selecting
    parts: list[tuple[Tensor, Tensor | None]] = []
    if num_dense:
        parts.append(
            causal_attention(
                queries[:, :, :num_dense],
                query_positions[:, :num_dense],
                states.tokens(slice(0, states.keys.shape[2] - num_selecting)),
                kv_head_index,
                scaling=scaling,
                return_log_sum_exp=return_log_sum_exp,
            )
        )
    if index_queries is not None:
        parts.append(
            retrieval_attention(
                queries[:, :, num_dense:],
                query_positions[:, num_dense:],
                states,
                kv_head_index,
                index_queries,
                rule,
                scaling=scaling,
                statistics=statistics,
                return_log_sum_exp=return_log_sum_exp,
                selector=selector,
                sinks=sinks,
            )
        )
    output = torch.cat([part for part, _ in parts], 2)
    if not return_log_sum_exp:
        return output, None
    return output, torch.cat([part for _, part in parts if part is not None], 2)

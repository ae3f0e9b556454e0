"""A whole layer: each query head attends in its own way; outputs are joined in head order."""

from __future__ import annotations

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.eager.local import causal_attention, local_attention
from rtpurbo.ops.eager.retrieval import retrieval_attention
from rtpurbo.ops.states import HeadLayout, KeyValueStates, SelectionStatistics


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
) -> tuple[Tensor, Tensor | None]:
    """Retrieval heads over selected keys, local heads over sinks and window.

    Retrieval heads are dense where the rule says so: `prefill_mode` `dense` with more than one
    query row.

    Args:
        query_states: [batch, num_attention_heads, q_len, head_dim], after RoPE.
        query_positions: int64 [batch, q_len], -1 for padding.
        full: states of the KV heads kept whole, with index keys for the retrieval heads.
        bounded: states of the other KV heads; sinks and the last W keys are enough.
        layout: which head does what.
        index_queries: [batch, num_retrieval_heads, q_len, index_dim], or None if nothing is to be
            selected.
        rule: windows and selection.
        scaling: factor on the dot products.
        statistics: counts what retrieval heads select, if given.
        return_log_sum_exp: whether to return it.

    Returns:
        Output [batch, num_attention_heads, q_len, head_dim] and the log-sum-exp
        [batch, num_attention_heads, q_len] or None.
    """
    parts: list[tuple[Tensor, Tensor | None]] = []
    if len(layout.retrieval):
        queries, readers = query_states[:, layout.retrieval.heads], layout.retrieval.key_value_heads
        if index_queries is None or (rule.prefill_mode == "dense" and query_states.shape[2] > 1):
            parts.append(
                causal_attention(
                    queries,
                    query_positions,
                    full,
                    readers,
                    scaling=scaling,
                    return_log_sum_exp=return_log_sum_exp,
                )
            )
        else:
            parts.append(
                retrieval_attention(
                    queries,
                    query_positions,
                    full,
                    readers,
                    index_queries,
                    rule,
                    scaling=scaling,
                    statistics=statistics,
                    return_log_sum_exp=return_log_sum_exp,
                )
            )
    for group, states in ((layout.local_full, full), (layout.local_bounded, bounded)):
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
    return output, torch.cat([part for _, part in parts if part is not None], 1)[:, layout.order]

"""Dense attention of local heads for the last queries of a prompt (docs/experiment-log.md, 2026-11-29).

A question at the end of a long prompt looks for what it asks in the whole prompt. With windowed local heads its
tokens are computed from less than in the dense model, which loses more than windows in the prompt before them and in
the answer after them.
"""

from __future__ import annotations

from torch import Tensor

from rtpurbo.ops.eager.local import causal_attention
from rtpurbo.ops.sinks import with_sinks
from rtpurbo.ops.states import HeadLayout, KeyValueStates


def with_dense_queries(
    output: Tensor,
    log_sum_exp: Tensor | None,
    dense_queries: slice,
    query_states: Tensor,
    query_positions: Tensor,
    full: KeyValueStates,
    windowed: KeyValueStates,
    layout: HeadLayout,
    *,
    scaling: float,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Replaces the local heads' attention of some queries by dense causal attention.

    Args:
        output: [batch, num_attention_heads, q_len, head_dim], overwritten unless it needs a gradient.
        log_sum_exp: [batch, num_attention_heads, q_len] or None; overwritten in the same way.
        dense_queries: the queries.
        query_states: [batch, num_attention_heads, q_len, head_dim], after RoPE.
        query_positions: int64 [batch, q_len], -1 for padding.
        full: states of the full KV heads.
        windowed: states of the windowed KV heads, with every key up to these queries.
        layout: query heads by kind.
        scaling: factor on the dot products.
        sinks: learned sinks [num_attention_heads].

    Returns:
        Output and log-sum-exp, shaped as before.
    """
    if output.requires_grad:
        output = output.clone()
    if log_sum_exp is not None and log_sum_exp.requires_grad:
        log_sum_exp = log_sum_exp.clone()
    for group, states in ((layout.local_full, full), (layout.local_windowed, windowed)):
        if not len(group):
            continue
        part, part_log_sum_exp = causal_attention(
            query_states[:, group.heads, dense_queries],
            query_positions[:, dense_queries],
            states,
            group.key_value_heads,
            scaling=scaling,
            return_log_sum_exp=log_sum_exp is not None or sinks is not None,
        )
        if sinks is not None:
            assert part_log_sum_exp is not None
            part, part_log_sum_exp = with_sinks(part, part_log_sum_exp, sinks[group.heads])
        output[:, group.heads, dense_queries] = part.to(output.dtype)
        if log_sum_exp is not None:
            assert part_log_sum_exp is not None
            log_sum_exp[:, group.heads, dense_queries] = part_log_sum_exp.to(log_sum_exp.dtype)
    return output, log_sum_exp

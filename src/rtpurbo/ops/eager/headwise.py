"""Attention of a layer by kind of head, with the outputs in head order."""

from __future__ import annotations

from torch import Tensor

from rtpurbo.ops.eager.attend import joined
from rtpurbo.ops.eager.local import causal_attention, local_attention
from rtpurbo.ops.eager.retrieval import retrieval_attention
from rtpurbo.ops.sinks import with_sinks
from rtpurbo.ops.states import AttentionCall


def headwise_attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Retrieval heads over selected keys, local heads over sinks and window.

    Dense queries of local heads are left to `with_dense_queries`.

    Returns:
        Output [batch, num_attention_heads, q_len, head_dim] and the log-sum-exp
        [batch, num_attention_heads, q_len] or None.
    """
    needs_log_sum_exp = call.return_log_sum_exp or call.sinks is not None
    parts = []
    if len(call.layout.retrieval):
        parts.append(_retrieval_heads(call, needs_log_sum_exp))
    for group, states in call.local_groups:
        parts.append(
            local_attention(
                call.query_states[:, group.heads],
                call.query_positions,
                states,
                group.key_value_heads,
                sliding_window=call.rule.sliding_window,
                num_sink_tokens=call.rule.num_sink_tokens,
                scaling=call.scaling,
                return_log_sum_exp=needs_log_sum_exp,
            )
        )
    output, log_sum_exp = joined(parts, 1)
    output = output[:, call.layout.order]
    if log_sum_exp is None:
        return output, None
    log_sum_exp = log_sum_exp[:, call.layout.order]
    if call.sinks is not None:
        output, log_sum_exp = with_sinks(output, log_sum_exp, call.sinks)
    return output, log_sum_exp if call.return_log_sum_exp else None


def _retrieval_heads(call: AttentionCall, needs_log_sum_exp: bool) -> tuple[Tensor, Tensor | None]:
    """Selected attention of the last queries, which have index queries; dense attention of the others."""
    heads, kv_head_index = call.layout.retrieval.heads, call.layout.retrieval.key_value_heads
    queries, states = call.query_states[:, heads], call.full
    num_selecting = 0 if call.index_queries is None else call.index_queries.shape[2]
    num_dense = queries.shape[2] - num_selecting
    parts = []
    if num_dense:
        parts.append(
            causal_attention(
                queries[:, :, :num_dense],
                call.query_positions[:, :num_dense],
                states.tokens(slice(0, states.keys.shape[2] - num_selecting)),
                kv_head_index,
                scaling=call.scaling,
                return_log_sum_exp=needs_log_sum_exp,
            )
        )
    if call.index_queries is not None:
        parts.append(
            retrieval_attention(
                queries[:, :, num_dense:],
                call.query_positions[:, num_dense:],
                states,
                kv_head_index,
                call.index_queries,
                call.rule,
                scaling=call.scaling,
                statistics=call.statistics,
                return_log_sum_exp=needs_log_sum_exp,
                selector=call.selector,
                sinks=None if call.sinks is None else call.sinks[heads],
            )
        )
    return joined(parts, 2)


def with_dense_queries(
    output: Tensor, log_sum_exp: Tensor | None, call: AttentionCall
) -> tuple[Tensor, Tensor | None]:
    """Replaces the local heads' attention of the dense queries by dense causal attention.

    A question at the end of a long prompt looks for what it asks in the whole prompt. With windowed local heads its
    tokens are computed from less than in the dense model, which loses more than windows in the prompt before them
    and in the answer after them (docs/experiment-log.md, 2026-11-29).

    Args:
        output: of the call without dense queries, overwritten unless it needs a gradient.
        log_sum_exp: of that call, overwritten in the same way; or None.
        call: with dense queries.

    Returns:
        Output and log-sum-exp, shaped as before.
    """
    rows = call.dense_queries
    assert rows is not None
    if output.requires_grad:
        output = output.clone()
    if log_sum_exp is not None and log_sum_exp.requires_grad:
        log_sum_exp = log_sum_exp.clone()
    for group, states in call.local_groups:
        part, part_log_sum_exp = causal_attention(
            call.query_states[:, group.heads, rows],
            call.query_positions[:, rows],
            states,
            group.key_value_heads,
            scaling=call.scaling,
            return_log_sum_exp=log_sum_exp is not None or call.sinks is not None,
        )
        if call.sinks is not None:
            assert part_log_sum_exp is not None
            part, part_log_sum_exp = with_sinks(part, part_log_sum_exp, call.sinks[group.heads])
        output[:, group.heads, rows] = part.to(output.dtype)
        if log_sum_exp is not None:
            assert part_log_sum_exp is not None
            log_sum_exp[:, group.heads, rows] = part_log_sum_exp.to(log_sum_exp.dtype)
    return output, log_sum_exp

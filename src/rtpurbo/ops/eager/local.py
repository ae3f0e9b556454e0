"""Window attention of local heads, and dense causal attention."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from rtpurbo.ops.eager.attend import attend, joined
from rtpurbo.ops.eager.visibility import causal_mask, keys_in_reach, near_mask, query_chunks
from rtpurbo.ops.states import KeyValueStates, check_states


def local_attention(
    query_states: Tensor,
    query_positions: Tensor,
    states: KeyValueStates,
    key_value_heads: Tensor,
    *,
    sliding_window: int | Tensor,
    num_sink_tokens: int,
    scaling: float,
    return_log_sum_exp: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention over sinks and the sliding window.

    Args:
        query_states: [batch, heads, q_len, head_dim], after RoPE.
        query_positions: int64 [batch, q_len], -1 for padding.
        states: keys and values, in any order.
        key_value_heads: int64 [heads], KV head index of each query head in `states`.
        sliding_window: W, or int64 [heads] for a window per head.
        num_sink_tokens: S.
        scaling: factor on the dot products.
        return_log_sum_exp: also return the log-sum-exp.

    Returns:
        Output [batch, heads, q_len, head_dim] and the log-sum-exp [batch, heads, q_len] or None.
    """
    check_states(query_states, query_positions, states)
    widest = int(sliding_window.max()) if isinstance(sliding_window, Tensor) else sliding_window
    # A chunk about as long as the window reads at most twice the keys that its queries need; for the fused kernels
    # of a GPU, fewer launches are faster than fewer keys. Explicit logits take memory.
    fused = query_states.is_cuda and not return_log_sum_exp
    chunk_size = 8192 if fused else max(128, min(widest, 1024))
    parts = []
    for start in range(0, query_states.shape[2], chunk_size):
        chunk = slice(start, start + chunk_size)
        positions = query_positions[:, chunk]
        reach = keys_in_reach(positions, states.positions, widest, num_sink_tokens)
        read = states if reach is None else replace(states, index_keys=None).tokens(reach)
        near = near_mask(positions, read.positions, sliding_window, num_sink_tokens)
        keys, values = read.keys[:, key_value_heads], read.values[:, key_value_heads]
        queries = query_states[:, :, chunk]
        parts.append(attend(queries, keys, values, near, scaling, return_log_sum_exp))
    return joined(parts, 2)


def causal_attention(
    query_states: Tensor,
    query_positions: Tensor,
    states: KeyValueStates,
    key_value_heads: Tensor,
    *,
    scaling: float,
    return_log_sum_exp: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Dense causal attention; arguments as in `local_attention`."""
    check_states(query_states, query_positions, states)
    # Indexing by `[]` has a slower gradient, which sorts.
    keys, values = (each.index_select(1, key_value_heads) for each in (states.keys, states.values))
    q_len, k_len = query_states.shape[2], keys.shape[2]
    if states.in_order and not return_log_sum_exp and (q_len == k_len or q_len == 1):
        output = F.scaled_dot_product_attention(
            query_states, keys, values, is_causal=q_len > 1, scale=scaling
        )
        return output, None
    parts = []
    for chunk in query_chunks(q_len, query_states.shape[0] * query_states.shape[1] * k_len):
        visible = causal_mask(query_positions[:, chunk], states.positions)
        queries = query_states[:, :, chunk]
        parts.append(attend(queries, keys, values, visible, scaling, return_log_sum_exp))
    return joined(parts, 2)

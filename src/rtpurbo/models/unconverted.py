"""Attention of layers that are not converted: with sliding windows, or dense."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rtpurbo.config import AttentionRule
from rtpurbo.errors import RTPurboError
from rtpurbo.models.slots import WindowedPositions
from rtpurbo.ops import KeyValueStates, headwise_attention
from rtpurbo.ops.states import uniform_layout


def unconverted_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | WindowedPositions | None,
    s_aux: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Runs window attention by the operators of `rtpurbo.ops`, any other by that of PyTorch.

    Args:
        module: the attention module.
        query: [batch, num_attention_heads, q_len, head_dim].
        key: [batch, num_key_value_heads, k_len, head_dim].
        value: shaped as `key`.
        attention_mask: the positions of the keys and the window; bool [batch, 1, q_len, k_len]; or None for a
            causal mask.
        s_aux: learned sinks [num_attention_heads].
        scaling: factor on the dot products; None for head_dim ** -0.5.
        kwargs: of transformers' attention interface.

    Returns:
        Output [batch, q_len, num_attention_heads, head_dim], and None for the weights.

    Raises:
        RTPurboError: logits are capped, there are learned sinks and another mask than that of a window, or it
            is a mask of another kind.
    """
    is_capped = kwargs.get("softcap") is not None
    if isinstance(attention_mask, WindowedPositions) and not is_capped:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _window_attention(query, key, value, attention_mask, s_aux, scaling), None
    # PyTorch's own causal mask begins with the first key, not with the first of the last tokens.
    is_causal = attention_mask is None and query.shape[2] in (1, key.shape[2])
    is_masked = isinstance(attention_mask, Tensor) and attention_mask.ndim == 4
    if is_capped or s_aux is not None or not (is_causal or is_masked):
        raise RTPurboError(
            f"{type(module).__name__} layers that stay dense support learned sinks only with a sliding window "
            "over whole sequences (without restarting position_ids), and no capped logits."
        )
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


def _window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: WindowedPositions,
    sinks: Tensor | None,
    scaling: float,
) -> Tensor:
    """Attention of a layer whose heads are all local: [batch, q_len, num_attention_heads, head_dim]."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    mask = mask.to(key.device)
    queries_only = slice(key.shape[2] - query.shape[2], None)
    # Without full KV heads, the kernels read no more of them than the positions of the queries.
    full = KeyValueStates(
        key[:, :0, queries_only], value[:, :0, queries_only], mask.query_positions
    )
    windowed = KeyValueStates(
        key, value, mask.positions, in_order=mask.in_order, first_slots=mask.first_slots
    )
    output, _ = headwise_attention(
        query,
        mask.query_positions,
        full,
        windowed,
        uniform_layout(query.shape[1], key.shape[1], key.device, retrieves=False),
        None,
        _rule(mask.window),
        scaling=scaling,
        sinks=sinks,
    )
    return output.transpose(1, 2).contiguous()


@cache
def _rule(window: int) -> AttentionRule:
    """Rule of a layer without sinks among the keys."""
    return AttentionRule(num_sink_tokens=0, sliding_window=window, block_size=1)

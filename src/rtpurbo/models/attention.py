"""The attention function and the mask function that sparse models register with transformers.

A model's own attention modules stay: their projections, norms, rotary embeddings and gates run as before.
They call this function with queries and keys after the rotation, or, where there is a cache, with the
`NewStates` that `HeadwiseLayer.update` returned in the place of keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from rtpurbo.config import AttentionRule
from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import window_covers_context
from rtpurbo.models.cache_layers import NewStates
from rtpurbo.models.slots import WindowedPositions, positions_of
from rtpurbo.models.sparse_layer import sparse_layer_of
from rtpurbo.ops import KeyValueStates, headwise_attention
from rtpurbo.ops.states import uniform_layout

IMPLEMENTATION = "rtpurbo"


def key_positions_as_mask(
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    mask_function: Callable[..., Any] = causal_mask_function,
    **kwargs: Any,
) -> Tensor | WindowedPositions | None:
    """Passes the position of every key to the layers in place of an attention mask.

    Positions are all a layer needs, and they cost k_len numbers where a mask costs q_len x k_len.

    Returns:
        int64 [batch, kv_length], -1 for padding; None without a mask; an empty tensor [0] for a mask that
        is not causal, such as that of packed sequences; positions with the window for a layer that keeps its
        own window; or the usual mask for any other layer.
    """
    if local_size is None or window_covers_context(config, local_size):
        if local_size is None and mask_function is not causal_mask_function:
            return torch.empty(0)
        return None if attention_mask is None else positions_of(attention_mask[:, :kv_length])
    # transformers sets these for packed sequences and for functions that change the mask.
    is_changed = kwargs.get("use_vmap") or not kwargs.get("allow_is_causal_skip", True)
    if is_changed or getattr(config, "attention_chunk_size", None) is not None:
        return sdpa_mask(
            kv_length=kv_length,
            attention_mask=attention_mask,
            local_size=local_size,
            mask_function=mask_function,
            **kwargs,
        )
    # transformers 5.0 gives the positions of the new tokens instead of their number.
    q_length = kwargs["q_length"] if "q_length" in kwargs else len(kwargs["cache_position"])
    device = kwargs.get("device", "cpu")
    if attention_mask is not None:
        offset, device = kwargs.get("kv_offset", 0), attention_mask.device
        attention_mask = attention_mask[:, offset : offset + kv_length].to(torch.bool)
    return WindowedPositions.build(
        attention_mask, kwargs["batch_size"], q_length, kv_length, local_size, device
    )


def sparse_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor | NewStates,
    value: Tensor | NewStates,
    attention_mask: Tensor | WindowedPositions | None,
    dropout: float = 0.0,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function of a sparse model, as transformers calls it.

    Args:
        module: the attention module that calls.
        query: [batch, num_attention_heads, q_len, head_dim], after RoPE.
        key: [batch, num_key_value_heads, k_len, head_dim], after RoPE, or what `update` returned.
        value: shaped as `key`.
        attention_mask: from `key_positions_as_mask`.
        dropout: of attention weights.
        s_aux: learned sinks [num_attention_heads], logits that take part in the softmax.
        kwargs: of other layers' attention.

    Returns:
        Output [batch, q_len, num_attention_heads, value_dim], and None for the weights.

    Raises:
        RTPurboError: a sparse layer cannot serve the call.
    """
    layer = sparse_layer_of(module)
    if layer is None:
        assert isinstance(key, Tensor)
        assert isinstance(value, Tensor)
        return unconverted_attention(
            module, query, key, value, attention_mask, dropout=dropout, s_aux=s_aux, **kwargs
        )
    if dropout:
        raise RTPurboError(
            f"sparse attention has no dropout, but the model trains with attention_dropout {dropout}: "
            "load it with attention_dropout=0."
        )
    assert not isinstance(attention_mask, WindowedPositions)
    output = layer.forward(query, key, value, attention_mask, s_aux)
    return output.transpose(1, 2).contiguous(), None


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

    Arguments and results are as in `sparse_attention`; the mask may also be bool [batch, 1, q_len, k_len], and None is
    a causal mask.

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


AttentionInterface.register(IMPLEMENTATION, sparse_attention)
AttentionMaskInterface.register(IMPLEMENTATION, key_positions_as_mask)

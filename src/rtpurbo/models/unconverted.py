"""Attention of layers that are not converted: with sliding windows, or dense."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rtpurbo.ops.eager import visibility


def unconverted_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Runs PyTorch's attention, or the eager one of the model if logits are capped or sinks are learned.

    Args:
        module: the attention module.
        query: [batch, num_attention_heads, q_len, head_dim].
        key: [batch, num_key_value_heads, k_len, head_dim].
        value: shaped as `key`.
        attention_mask: bool [batch, 1, q_len, k_len]; the positions of the keys, int64 [batch, k_len]; or
            None for a causal mask.
        kwargs: of transformers' attention interface.

    Returns:
        Output [batch, q_len, num_attention_heads, head_dim], and None for the weights.
    """
    is_plain = kwargs.get("s_aux") is None and kwargs.get("softcap") is None
    if attention_mask is not None and attention_mask.ndim == 2:
        real = attention_mask[:, None, None, : key.shape[2]] >= 0
        attention_mask = _causal(query, key) & real
    elif attention_mask is None and (not is_plain or 1 < query.shape[2] < key.shape[2]):
        # PyTorch's own causal mask begins with the first key, not with the first of the last tokens.
        attention_mask = _causal(query, key)
    if is_plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    assert attention_mask is not None
    own = sys.modules[type(module).__module__].eager_attention_forward
    lowest = torch.finfo(query.dtype).min
    outputs = []
    for queries, keys in _blocks(query, key, kwargs.get("sliding_window")):
        mask = attention_mask[:, :, queries, keys]
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
        output, _ = own(
            module, query[:, :, queries], key[:, :, keys], value[:, :, keys], mask, **kwargs
        )
        outputs.append(output)
    return torch.cat(outputs, 1), None


def _blocks(query: Tensor, key: Tensor, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yields blocks of queries and the keys they read: the weights of a long prompt exceed the memory."""
    batch, heads, q_len, _ = query.shape
    k_len = key.shape[2]
    before = k_len if window is None else window
    # A block of n queries reads n + window keys, and n is at most the root of the limit.
    most = math.isqrt(visibility.MAX_CHUNK_ELEMENTS // (batch * heads))
    for block in visibility.query_chunks(q_len, batch * heads * min(k_len, before + most)):
        end = k_len - q_len + block.stop
        first = end - (block.stop - block.start) + 1 - before
        yield block, slice(max(0, first), end)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """Returns a causal mask bool [1, 1, q_len, k_len] of queries that are the last tokens."""
    q_len, k_len = query.shape[2], key.shape[2]
    mask = torch.ones(q_len, k_len, dtype=torch.bool, device=query.device)
    return mask.tril(k_len - q_len)[None, None]

"""Attention of layers that are not converted: with sliding windows, or dense."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

QUERIES_AT_ONCE = 1024
"""Queries of a block of eager attention."""


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
    if attention_mask.dtype == torch.bool:
        lowest = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(
            ~attention_mask, lowest
        )
    # In blocks of queries: the weights of a whole long prompt may be larger than the memory.
    window, ahead = kwargs.get("sliding_window"), key.shape[2] - query.shape[2]
    outputs = []
    for start in range(0, query.shape[2], QUERIES_AT_ONCE):
        end = min(start + QUERIES_AT_ONCE, query.shape[2])
        keys = slice(max(0, ahead + start + 1 - window) if window else 0, ahead + end)
        output, _ = own(
            module, query[:, :, start:end], key[:, :, keys], value[:, :, keys],
            attention_mask[:, :, start:end, keys], **kwargs,
        )  # fmt: skip
        outputs.append(output)
    return torch.cat(outputs, 1), None


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """Returns a causal mask bool [1, 1, q_len, k_len] of queries that are the last tokens."""
    q_len, k_len = query.shape[2], key.shape[2]
    mask = torch.ones(q_len, k_len, dtype=torch.bool, device=query.device)
    return mask.tril(k_len - q_len)[None, None]

"""Softmax attention with an explicit mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

MASKED_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's, whose gradients under a mask were not finite for few queries in bf16 (docs/experiment-log.md)."""


def attention_logits(query_states: Tensor, key_states: Tensor, scaling: float) -> Tensor:
    """Scaled dot products in at least fp32.

    Args:
        query_states: [batch, heads, q_len, head_dim].
        key_states: [batch, heads, k_len, head_dim], expanded to the query heads.
        scaling: the model's factor, usually head_dim ** -0.5.

    Returns:
        [batch, heads, q_len, k_len].
    """
    logits = query_states @ key_states.transpose(-1, -2)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)) * scaling


def attend_to_logits(
    logits: Tensor, value_states: Tensor, visible: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the visible keys from given logits.

    Queries without visible keys (padding) get a zero output and a log-sum-exp of minus infinity.

    Args:
        logits: [batch, heads, q_len, k_len].
        value_states: [batch, heads, k_len, head_dim].
        visible: bool, broadcastable to the logits.

    Returns:
        Output [batch, heads, q_len, head_dim] in the values' dtype, and the natural log-sum-exp of
        the visible logits [batch, heads, q_len].
    """
    # Queries without keys attend to all keys and are zeroed afterwards: a softmax over no keys has no
    # finite gradient.
    blind = ~visible.any(-1, keepdim=True)
    logits = logits.masked_fill(~(visible | blind), -torch.inf)
    log_sum_exp = logits.logsumexp(-1).masked_fill(blind[..., 0], -torch.inf)
    output = logits.softmax(-1).to(value_states.dtype) @ value_states
    return output.masked_fill(blind, 0.0), log_sum_exp


def attend(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    visible: Tensor,
    scaling: float,
    return_log_sum_exp: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of each query over its visible keys; shapes as in `attend_to_logits`.

    Without the log-sum-exp, PyTorch's fused kernel computes the same in less time and memory.
    """
    if return_log_sum_exp:
        return attend_to_logits(
            attention_logits(query_states, key_states, scaling), value_states, visible
        )
    blind = ~visible.any(-1, keepdim=True)
    with sdpa_kernel(MASKED_KERNELS):
        output = F.scaled_dot_product_attention(
            query_states, key_states, value_states, attn_mask=visible | blind, scale=scaling
        )
    return output.masked_fill(blind, 0.0), None


def joined(parts: Sequence[tuple[Tensor, Tensor | None]], dim: int) -> tuple[Tensor, Tensor | None]:
    """Outputs of some heads or queries, and their log-sum-exps if there are any, as one along a dimension."""
    log_sum_exps = [part for _, part in parts if part is not None]
    output = torch.cat([part for part, _ in parts], dim)
    return output, torch.cat(log_sum_exps, dim) if log_sum_exps else None

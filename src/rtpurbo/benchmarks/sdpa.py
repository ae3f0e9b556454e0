"""Dense attention with PyTorch's kernels, selected by name."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def attention(name: str, *, is_causal: bool, grouped: bool) -> Attention:
    """Attention with exactly one kernel; `grouped` if keys and values have fewer heads than queries.

    Returns:
        A function of queries, keys, values [batch, heads, length, head_dim] and a scale.
    """
    backend = BACKENDS[name]

    def attend(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                queries, keys, values, is_causal=is_causal, scale=scaling, enable_gqa=grouped
            )

    return attend


def attention_with_folded_groups(name: str) -> Attention:
    """Attention of one query token per sequence, with the query heads of a KV head as its query positions."""
    backend = BACKENDS[name]

    def attend(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        batch, heads, _, head_dim = queries.shape
        folded = queries.reshape(batch, keys.shape[1], -1, head_dim)
        with sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(folded, keys, values, scale=scaling)
        return output.reshape(batch, heads, 1, head_dim)

    return attend


def step_attentions(name: str) -> dict[str, Attention]:
    """Variants in which one kernel can run a decode step."""
    return {
        "query heads folded into rows": attention_with_folded_groups(name),
        "KV heads shared": attention(name, is_causal=False, grouped=True),
    }


def prompt_attentions(name: str) -> dict[str, Attention]:
    """Variants in which one kernel can run a prompt."""
    attend = attention(name, is_causal=True, grouped=False)

    def expanded(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        group = queries.shape[1] // keys.shape[1]
        keys, values = (part.repeat_interleave(group, 1) for part in (keys, values))
        return attend(queries, keys, values, scaling)

    return {
        "KV heads shared": attention(name, is_causal=True, grouped=True),
        "KV heads expanded": expanded,
    }

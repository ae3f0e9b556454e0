"""Dense attention by the kernels that PyTorch brings, each by its name, as well as it can."""

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
    """Attention by one kernel and no other.

    Args:
        name: a name in `BACKENDS`.
        is_causal: whether rows see no later keys.
        grouped: keys and values have fewer heads than queries.

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
    """One query token a sequence: the query heads that share a KV head stand as its rows."""
    backend = BACKENDS[name]

    def attend(queries: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        batch, heads, _, head_dim = queries.shape
        rows = queries.reshape(batch, keys.shape[1], -1, head_dim)
        with sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(rows, keys, values, scale=scaling)
        return output.reshape(batch, heads, 1, head_dim)

    return attend

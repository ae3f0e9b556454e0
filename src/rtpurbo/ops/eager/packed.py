"""Dense attention of packed documents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    document_lengths: Sequence[int],
    *,
    scaling: float,
) -> Tensor:
    """Causal attention of every head within its document.

    One call per document: needs no mask and computes no pair of two documents.

    Args:
        query_states: [batch, num_attention_heads, length, head_dim], after RoPE.
        key_states: [batch, num_key_value_heads, length, head_dim].
        value_states: the same shape (the last size may differ).
        document_lengths: tokens of each document in order; the same for every sequence of the batch.
        scaling: factor on the dot products.

    Returns:
        [batch, num_attention_heads, length, head_dim].
    """
    group = query_states.shape[1] // key_states.shape[1]
    lengths = list(document_lengths)
    outputs = [
        F.scaled_dot_product_attention(
            queries,
            keys.repeat_interleave(group, 1),
            values.repeat_interleave(group, 1),
            is_causal=True,
            scale=scaling,
        )
        for queries, keys, values in zip(
            query_states.split(lengths, 2),
            key_states.split(lengths, 2),
            value_states.split(lengths, 2),
            strict=True,
        )
    ]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)

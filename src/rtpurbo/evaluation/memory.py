"""What a key-value cache weighs, counted from the tensors it holds."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.cache_layers import HeadwiseLayer
from rtpurbo.models.families import attention_modules
from rtpurbo.models.sparsify import is_sparse

# Tensors of this device have shapes but no memory, so that any length can be counted anywhere.
DEVICE = torch.device("meta")


def cache_bytes(
    model: PreTrainedModel,
    context_length: int,
    batch_size: int = 1,
    *,
    index_keys: bool = True,
    dense: bool = False,
) -> int:
    """Bytes of the cache after a prompt.

    The model's own kind of cache is filled as its layers would fill it.

    Args:
        model: dense or sparse.
        context_length: tokens of the prompt.
        batch_size: sequences.
        index_keys: whether those of retrieval heads are held too.
        dense: of a sparse model, what it held before it became sparse.
    """
    sparse = is_sparse(model) and not dense
    cache = HeadwiseCache(model) if sparse else DynamicCache(config=model.config)
    if isinstance(cache, HeadwiseCache):
        cache.enter(None, batch_size, context_length, DEVICE)

    def states(heads: int, dim: int, dtype: torch.dtype = model.dtype) -> torch.Tensor:
        return torch.zeros(batch_size, heads, context_length, dim, dtype=dtype, device=DEVICE)

    attention: Any
    for layer, (_, _, attention) in zip(cache.layers, attention_modules(model), strict=True):
        keys = states(model.config.num_key_value_heads, attention.head_dim)
        if isinstance(layer, HeadwiseLayer):
            index = None
            if attention.retrieval_heads and index_keys:
                in_float8 = attention.rule.index_storage == "float8"
                dtype = torch.float8_e4m3fn if in_float8 else model.dtype
                num_keys, index_dim, _ = attention.indexer.key_weight.shape
                index = states(num_keys, index_dim, dtype)
            layer.append(keys, keys, index, attention.layout(DEVICE))
        else:
            layer.update(keys, keys)
    if isinstance(cache, HeadwiseCache):
        return cache.num_bytes()
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def full_key_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of the keys, without values, of so many tokens in the KV heads kept whole."""
    head_map = model.rtpurbo_config.head_map
    layers = zip(head_map.retrieval_heads, attention_modules(model), strict=True)
    return (
        sum(
            len(head_map.full_key_value_heads(layer)) * attention.head_dim * model.dtype.itemsize
            for layer, (heads, (_, _, attention)) in enumerate(layers)
            if heads
        )
        * tokens
    )

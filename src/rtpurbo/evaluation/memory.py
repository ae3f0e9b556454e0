"""Size of a KV cache in bytes, counted from the tensors it holds."""

from __future__ import annotations

import torch
from transformers import DynamicCache, PreTrainedModel

from rtpurbo.models.architecture import attention_shapes
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.cache_layers import HeadwiseLayer
from rtpurbo.models.probe import probe
from rtpurbo.models.sparse_layers import headwise_modules, is_sparse

# Tensors on this device have no memory, so that any length can be computed.
DEVICE = torch.device("meta")


def cache_bytes(
    model: PreTrainedModel,
    context_length: int,
    batch_size: int = 1,
    *,
    index_keys: bool = True,
    dense: bool = False,
) -> int:
    """Returns the bytes of the cache of a dense or sparse model after a prompt.

    The model's cache class is filled as in a prefill. Recurrent states, whose size does not depend on the
    prompt, are left out. With `dense`, the cache is that of a sparse model before it was converted.
    """
    sparse = is_sparse(model) and not dense
    cache = HeadwiseCache(model) if sparse else DynamicCache(config=model.config)
    if isinstance(cache, HeadwiseCache):
        cache.begin_forward(None, batch_size, context_length, DEVICE)

    def states(heads: int, dim: int, dtype: torch.dtype = model.dtype) -> torch.Tensor:
        return torch.zeros(batch_size, heads, context_length, dim, dtype=dtype, device=DEVICE)

    shapes, traits = attention_shapes(model.config), probe(model)
    attention = {each.layer_idx: each for each in headwise_modules(model)} if sparse else {}
    for number, layer in enumerate(cache.layers):
        found = traits.get(number)
        shape = found or shapes.get(number)
        if shape is None:
            continue
        heads, head_dim = shape.num_key_value_heads, shape.head_dim
        keys = states(heads, head_dim)
        values = states(heads, head_dim if found is None else found.value_dim)
        if isinstance(layer, HeadwiseLayer):
            index, own = None, attention[number]
            if own.retrieval_heads and index_keys:
                in_float8 = own.rule.index_storage == "float8"
                dtype = torch.float8_e4m3fn if in_float8 else model.dtype
                num_keys, index_dim, _ = own.indexer.key_weight.shape
                index = states(num_keys, index_dim, dtype)
            layer.append(keys, values, index, own.layout(DEVICE))
        else:
            layer.update(keys, values)
    if isinstance(cache, HeadwiseCache):
        return cache.num_bytes()
    return sum(
        layer.keys.nbytes + layer.values.nbytes
        for number, layer in enumerate(cache.layers)
        if number in shapes
    )


def full_key_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Returns the bytes of the keys, without values, of a number of tokens in full KV heads."""
    head_map = model.rtpurbo_config.head_map
    values = sum(
        len(head_map.full_key_value_heads(layer.layer_idx)) * layer.head_dim
        for layer in headwise_modules(model)
    )
    return values * model.dtype.itemsize * tokens

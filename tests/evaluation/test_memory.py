import pytest
import torch
from transformers import DynamicCache

from rtpurbo.evaluation.memory import cache_bytes
from rtpurbo.models.cache import HeadwiseCache
from tests.models.zoo.configurations import EQUAL
from tests.tiny_models import KEY_VALUE_HEADS, any_model, make_sparse, sparse_config, tiny_model

LENGTH = 100


def prefilled(model, cache, batch_size):
    ids = torch.arange(LENGTH).remainder(60).expand(batch_size, LENGTH)
    model(ids, past_key_values=cache, use_cache=True)
    return cache


def tensor_bytes(cache):
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "phi3"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_bytes_are_those_of_a_real_cache(family, batch_size):
    model = tiny_model(family)
    dense = cache_bytes(model, LENGTH, batch_size)
    cache = prefilled(model, DynamicCache(config=model.config), batch_size)
    assert dense == tensor_bytes(cache)

    for heads, shared_keys in (([1], False), ([0, 1, 4], False), ([0, 1, 4], True)):
        make_sparse(model, sparse_config(model, heads, shared_keys=shared_keys))
        for storage in ("model", "float8"):
            model.rtpurbo.set_rule(index_storage=storage)
            cache = prefilled(model, HeadwiseCache(model), batch_size)
            assert cache_bytes(model, LENGTH, batch_size) == cache.num_bytes()


def test_shared_index_keys_take_the_room_of_one_a_kv_head():
    sizes = {}
    for shared_keys in (False, True):
        model = tiny_model()
        make_sparse(model, sparse_config(model, range(6), shared_keys=shared_keys))
        without = cache_bytes(model, LENGTH, index_keys=False)
        sizes[shared_keys] = cache_bytes(model, LENGTH) - without
    # layers, index keys of a token, index_dim, bytes of float32
    assert sizes[False] == 2 * 6 * LENGTH * 4 * 4
    assert sizes[True] == 2 * KEY_VALUE_HEADS * LENGTH * 4 * 4


def test_a_dense_cache_holds_every_key_and_value():
    # layers, keys and values, KV heads, head_dim, bytes of float32
    assert cache_bytes(tiny_model(), LENGTH) == 2 * 2 * KEY_VALUE_HEADS * LENGTH * 8 * 4
    assert cache_bytes(tiny_model().bfloat16(), LENGTH) == 2 * 2 * KEY_VALUE_HEADS * LENGTH * 8 * 2


def test_without_retrieval_heads_the_length_costs_nothing():
    model = tiny_model()
    make_sparse(model, sparse_config(model, heads=[]))
    assert cache_bytes(model, LENGTH) == cache_bytes(model, 100_000)


def test_long_caches_are_counted_without_memory():
    model = tiny_model()
    make_sparse(model, sparse_config(model, heads=[0]))
    assert cache_bytes(model, 10**9) > 10**11


@pytest.mark.parametrize("name", ["Qwen3.5", "Nemotron-H", "Llama 4", "Gemma 4"])
def test_layers_without_attention_take_no_room(name):
    model_type, changes = EQUAL[name]
    model = any_model(model_type, **changes)
    dense = cache_bytes(model, LENGTH)
    cache = prefilled(model, DynamicCache(config=model.config), 1)
    holding = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert dense == sum(layer.keys.nbytes + layer.values.nbytes for layer in holding)
    make_sparse(model, sparse_config(model))
    cache = prefilled(model, HeadwiseCache(model), 1)
    recurrent = sum(
        state.nbytes
        for layer in cache.layers
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {}))
        for state in states.values()
    )
    assert cache_bytes(model, LENGTH) == cache.num_bytes() - recurrent

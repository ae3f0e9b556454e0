"""Index keys shared by the query heads of a KV head: one is kept, and all else is as with one a head."""

import pytest
import torch

from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.cache_layers import HeadwiseLayer
from rtpurbo.models.sparse_layers import headwise_modules
from tests.tiny_models import (
    LENGTH,
    PADDING,
    assert_same_logits,
    logits_of,
    padded_batch,
    sparse_model,
    with_own_keys,
)

PROMPT = 25
CHUNKS = [PROMPT, 7, 1, 1, LENGTH - PROMPT - 9]


@pytest.fixture(params=[(0, 1, 4), (1, 2, 3, 4, 5), range(6)], ids=str)
def model(request):
    return sparse_model(heads=request.param, shared_keys=True)


def index_keys(cache):
    return [
        layer.index_keys.storage[:, :, : layer.index_keys.length]
        for layer in cache.layers
        if isinstance(layer, HeadwiseLayer)
    ]


@pytest.mark.parametrize("storage", ["model", "float8"])
def test_a_cache_keeps_one_index_key_for_each_full_kv_head(model, storage):
    own = with_own_keys(model)
    ids, mask = padded_batch(PADDING)
    caches = []
    for one in (model, own):
        one.rtpurbo.set_rule(index_storage=storage)
        caches.append(HeadwiseCache(one))
    found, expected = (
        logits_of(one, ids, mask, CHUNKS, cache)
        for one, cache in zip((model, own), caches, strict=True)
    )
    assert_same_logits(found, expected, mask)
    layout = headwise_modules(model)[0].layout(ids.device)
    for shared, kept in zip(*map(index_keys, caches), strict=True):
        assert shared.shape == (3, len(layout.full_key_value_heads), LENGTH, 4)
        expanded = shared.float()[:, layout.retrieval.key_value_heads]
        torch.testing.assert_close(expanded, kept.float(), rtol=0.13, atol=1e-6)
    assert caches[0].num_bytes() < caches[1].num_bytes()


def test_one_forward_equals_one_index_key_a_head(model):
    ids, mask = padded_batch(PADDING)
    expected = logits_of(with_own_keys(model), ids, mask)
    assert_same_logits(logits_of(model, ids, mask), expected, mask)


def test_steps_in_fixed_slots_equal_one_forward(model):
    ids, mask = padded_batch(PADDING)
    cache = HeadwiseCache(model)
    logits_of(model, ids[:, :PROMPT], mask[:, :PROMPT], [PROMPT], cache)
    cache.make_static(64)
    steps = logits_of(model, ids[:, PROMPT:], mask, [1] * (LENGTH - PROMPT), cache)
    assert_same_logits(steps, logits_of(model, ids, mask)[:, PROMPT:], mask)


def test_rearranging_the_cache_commutes_with_recomputation(model):
    ids, mask = padded_batch(PADDING)
    cache = HeadwiseCache(model, crop_slack=8)
    logits_of(model, ids[:, :PROMPT], mask[:, :PROMPT], [PROMPT], cache)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    cache.crop(-3)
    ids, mask = ids[[2, 0, 1]], mask[[2, 0, 1]]
    held = PROMPT - 3
    continued = logits_of(model, ids[:, held:], mask, [LENGTH - held - 1, 1], cache)
    assert_same_logits(continued, logits_of(model, ids, mask)[:, held:], mask)

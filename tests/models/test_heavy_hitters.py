"""Heavy hitters of a prompt in the cache, and the same answers without a cache."""

import pytest
import torch

from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.sparsify import restore, runtime
from tests.tiny_models import (
    LENGTH,
    any_model,
    assert_same_logits,
    logits_of,
    make_sparse,
    padded_batch,
    sparse_config,
    sparse_model,
)

# Ten tokens of a prompt in the places of sinks, and dense retrieval heads, so that only windows lose.
RULE = {
    "num_sink_tokens": 12,
    "num_heavy_hitters": 10,
    "dense_prompt_queries": 12,
    "prefill_mode": "dense",
    "top_p": 1.0,
}
STEPS = 6


def logits(model, chunks=None, **rule):
    ids, mask = padded_batch()
    with runtime(model).rule(**rule):
        cache = HeadwiseCache(model) if chunks else None
        return logits_of(model, ids, mask, chunks=chunks, cache=cache), mask


def generated(model, **rule):
    """Logits of a prompt in one forward, and of decode steps after it."""
    return logits(model, [LENGTH - STEPS, *[1] * STEPS], **rule)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("dense", [12, LENGTH])
def test_training_computes_answers_as_generation_does(family, dense):
    model = sparse_model(family, **RULE | {"dense_prompt_queries": dense})
    for name, weight in model.named_parameters():
        if "q_norm" in name:
            # Flat attention chooses the sinks themselves, which the most queries see.
            weight.data.add_(4)
    expected, mask = generated(model)
    with runtime(model).decoding_last(STEPS):
        assert_same_logits(logits(model)[0], expected, mask)
    without, _ = generated(model, num_heavy_hitters=0)
    assert_same_logits(expected[:, :-STEPS], without[:, :-STEPS], mask[:, :-STEPS])
    assert not torch.allclose(expected[:, -STEPS:], without[:, -STEPS:])


def test_learned_sinks_take_part():
    model = any_model("gpt_oss", sliding_window=8).to(torch.float64)
    make_sparse(model, sparse_config(model, **RULE))
    expected, mask = generated(model)
    with runtime(model).decoding_last(STEPS):
        assert_same_logits(logits(model)[0], expected, mask)


def test_answers_are_dense_where_all_tokens_of_the_prompt_are_held():
    held = {"num_sink_tokens": LENGTH - 8, "num_heavy_hitters": LENGTH - 9}
    model = sparse_model(**RULE | held | {"dense_prompt_queries": LENGTH})
    found, mask = generated(model)
    restore(model)
    assert_same_logits(found, logits_of(model, *padded_batch()), mask)


def test_tokens_after_the_prompt_are_read_in_any_chunks():
    model = sparse_model(**RULE)
    one_by_one, mask = generated(model)
    at_once, _ = logits(model, [LENGTH - STEPS, STEPS - 1, 1])
    # Retrieval heads are dense here, and local heads read the same sinks in a chunk as in single steps.
    assert_same_logits(at_once, one_by_one, mask)


def test_later_prompts_do_not_replace_them():
    model = sparse_model(**RULE)
    ids, mask = padded_batch()
    cache = HeadwiseCache(model)
    logits_of(model, ids[:, :30], mask[:, :30], chunks=[30], cache=cache)
    sinks = [layer.ring.keys[:, :, :12].clone() for layer in cache.layers]
    logits_of(model, ids[:, 30:], mask, chunks=[14], cache=cache)
    for layer, before in zip(cache.layers, sinks, strict=True):
        assert torch.equal(layer.ring.keys[:, :, :12], before)

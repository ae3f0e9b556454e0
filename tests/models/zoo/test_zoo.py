"""Every decoder type: where it sees everything, a sparse model equals its dense self, or is refused."""

from dataclasses import replace

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rtpurbo.config import AttentionRule, IndexerSettings, RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.arguments import CACHE_NAME
from rtpurbo.models.sparse_layers import is_sparse
from rtpurbo.models.sparsify import empty_head_map, restore, sparsify
from tests.models.zoo.configurations import EQUAL, HEADS_BY_LAYER, REFUSED
from tests.tiny_models import LENGTH, any_model, logits_of, make_sparse, padded_batch

# Of different kinds: interleaved and partial rotation, none, windows, sinks, recurrent layers, mixtures.
FAST = [
    "Qwen3.5",
    "gpt-oss",
    "GLM-4.5",
    "MiniMax M2",
    "Llama 4",
    "Gemma 4",
    *HEADS_BY_LAYER,
    "Command-A",
    "Falcon-H1",
    "Mixtral",
    "Ministral 3",
    "Pythia",
]
WAYS = {
    "prefill": None,
    "chunks": (20, 9, LENGTH - 29),
    "decoding": (30,) + (1,) * (LENGTH - 30),
}
# Windows over everything; or a small window, and every head retrieves all that is far.
RULES = {"windows": (False, 256), "selection": (True, 8)}


def zoo_model(zoo, name):
    model_type, changes = zoo[name]
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"the installed transformers has no {model_type}")
    return any_model(model_type, **changes)


def seeing_everything(model, all_heads, window):
    empty = empty_head_map(model)
    rule = AttentionRule(
        num_sink_tokens=2,
        sliding_window=window,
        top_p=1.0,
        min_tokens=1,
        block_size=8,
        prefill_mode="top_p",
    )
    retrieval_heads: list = [None] * len(empty.retrieval_heads)
    for layer in empty.converted_layers:
        heads = empty.num_query_heads(layer)
        chosen = range(heads) if all_heads else {1 % heads, heads // 2}
        retrieval_heads[layer] = tuple(sorted(chosen))
    return RTPurboConfig(
        replace(empty, retrieval_heads=tuple(retrieval_heads)), rule, IndexerSettings(4)
    )


def largest_difference(actual, expected, mask):
    real = mask.bool()
    return float((actual - expected)[real].abs().max() / expected[real].abs().max())


@torch.no_grad()
def without_positions(model, ids, mask):
    """Logits of a prompt and the rest, of which only the mask says how long the padding is."""
    first = model(ids[:, :30], attention_mask=mask[:, :30], use_cache=True)
    cache = {CACHE_NAME: getattr(first, CACHE_NAME)}
    rest = model(ids[:, 30:], attention_mask=mask, use_cache=True, **cache)
    return torch.cat([first.logits, rest.logits], 1)


def check_equal(name):
    model = zoo_model(EQUAL, name)
    for padding in ((0,), (5, 0, 11)):
        ids, mask = padded_batch(padding)
        expected = {way: logits_of(model, ids, mask, chunks) for way, chunks in WAYS.items()}
        masked = without_positions(model, ids, mask)
        for rule, setting in RULES.items():
            make_sparse(model, seeing_everything(model, *setting))
            for way, logits in expected.items():
                actual = logits_of(model, ids, mask, WAYS[way])
                difference = largest_difference(actual, logits, mask)
                assert difference < 1e-4, f"{way} with {rule}, padding {padding}"
            assert largest_difference(without_positions(model, ids, mask), masked, mask) < 1e-4
            restore(model)
        assert torch.equal(logits_of(model, ids, mask), expected["prefill"])


@pytest.mark.parametrize("name", FAST)
def test_types_of_different_kinds_equal_their_dense_selves(name):
    check_equal(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EQUAL if name not in FAST])
def test_every_type_equals_its_dense_self(name):
    check_equal(name)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_types_have_a_reason(name):
    model = zoo_model(REFUSED, name)
    with pytest.raises(RTPurboError, match=r"(cannot be made sparse: .+|no decoder layers.+)\.$"):
        sparsify(model, RTPurboConfig(empty_head_map(model)))
    assert not is_sparse(model)

"""Every family: a sparse model that sees everything is its dense model, however it is run."""

import pytest
import torch

from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import check_architecture, convertible_layers
from rtpurbo.models.families import FAMILIES as SUPPORTED
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import restore, sparsify
from tests.tiny_models import (
    FAMILIES,
    HEADS,
    LENGTH,
    assert_same_logits,
    logits_of,
    make_sparse,
    padded_batch,
    sparse_config,
    tiny_model,
)

WAYS = {
    "without a cache": None,
    "prefill": [LENGTH],
    "chunked prefill": [13, 1, 20, LENGTH - 34],
    "decode": [LENGTH - 12] + [1] * 12,
}

SEE_EVERYTHING = {
    # Only retrieval heads look beyond the window.
    "top_p of 1": {"heads": range(HEADS), "top_p": 1.0, "prefill_mode": "top_p"},
    "windows over everything": {"heads": (1, 4), "sliding_window": LENGTH, "prefill_mode": "top_p"},
    "no retrieval heads": {"heads": (), "sliding_window": LENGTH},
}


@pytest.fixture(scope="module", params=FAMILIES)
def dense(request):
    """A tiny model and its dense logits."""
    model = tiny_model(request.param)
    return model, logits_of(model, *padded_batch())


def test_every_family_with_a_fast_path_is_tested():
    assert set(FAMILIES) == set(SUPPORTED)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setting", SEE_EVERYTHING)
def test_seeing_everything_equals_the_dense_model(dense, setting, way):
    model, expected = dense
    ids, mask = padded_batch()
    make_sparse(model, sparse_config(model, **SEE_EVERYTHING[setting]))
    try:
        assert_same_logits(logits_of(model, ids, mask, WAYS[way]), expected, mask)
    finally:
        restore(model)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("index_space", ["pre_rope", "post_rope", "low_frequency"])
def test_seeing_everything_equals_the_dense_model_in_every_index_space(index_space, way):
    model, (ids, mask) = tiny_model(), padded_batch()
    expected = logits_of(model, ids, mask)
    config = sparse_config(
        model, range(HEADS), index_space, top_p=1.0, prefill_mode="top_p", sliding_window=8
    )
    make_sparse(model, config)
    assert_same_logits(logits_of(model, ids, mask, WAYS[way]), expected, mask)


def test_a_small_window_changes_the_logits(dense):
    model, expected = dense
    ids, mask = padded_batch()
    make_sparse(model, sparse_config(model))
    try:
        difference = (logits_of(model, ids, mask) - expected)[mask.bool()].abs()
    finally:
        restore(model)
    assert difference.max() > 1e-2 * expected.abs().max()


def test_restoring_gives_bit_identical_logits(dense):
    model, expected = dense
    make_sparse(model, sparse_config(model))
    logits_of(model, *padded_batch(), WAYS["decode"])
    restore(model)
    assert torch.equal(logits_of(model, *padded_batch()), expected)


def test_state_dict_gains_nothing_but_indexers(dense):
    model, _ = dense
    before = {name: value.clone() for name, value in model.state_dict().items()}
    make_sparse(model, sparse_config(model))
    try:
        after = model.state_dict()
    finally:
        restore(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    added = set(after) - set(before)
    assert added
    assert all(".indexer." in name for name in added)
    assert set(model.state_dict()) == set(before)


def test_windowed_layers_stay_as_they_are():
    model = tiny_model("gemma3_text")
    make_sparse(model, sparse_config(model))
    assert [module.layer_idx for module in headwise_modules(model)] == [1]


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_window_as_long_as_the_context_is_no_window(family):
    model, (ids, mask) = tiny_model(family, sliding_window=256), padded_batch()
    expected = logits_of(model, ids, mask)
    config = sparse_config(model, range(HEADS), top_p=1.0, prefill_mode="top_p")
    make_sparse(model, config)
    assert len(headwise_modules(model)) == model.config.num_hidden_layers
    for chunks in WAYS.values():
        assert_same_logits(logits_of(model, ids, mask, chunks), expected, mask)


@pytest.mark.parametrize(
    "change", [{"is_causal": False}, {"use_bidirectional_attention": True}], ids=str
)
def test_attention_that_is_not_causal_is_refused(change):
    model = tiny_model(**change)
    with pytest.raises(RTPurboError, match="not causal"):
        sparsify(model, sparse_config(model))


def test_a_fully_windowed_mistral_is_refused():
    model = tiny_model("mistral", sliding_window=32)
    assert convertible_layers(model.config) == [False, False]
    with pytest.raises(RTPurboError, match="window of 32 keys"):
        sparsify(model, sparse_config(model))


def test_capped_logits_are_refused():
    config = tiny_model("gemma3_text").config
    config.attn_logit_softcapping = 50.0
    with pytest.raises(RTPurboError, match="attn_logit_softcapping"):
        check_architecture(config)

"""The token indexer: which dimensions it reads and how it projects them."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtpurbo.config import IndexerSettings
from rtpurbo.models.indexer import TokenIndexer, slow_dimensions
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import observing
from tests.tiny_models import (
    DROPPED,
    any_model,
    make_sparse,
    padded_batch,
    sparse_config,
    tiny_model,
)


@given(
    wavelengths=st.lists(st.floats(1, 1e6), min_size=1, max_size=16, unique=True),
    unrotated=st.integers(0, 6),
    shortest=st.floats(1, 1e6),
    at_least=st.integers(1, 12),
)
@settings(max_examples=80)
def test_low_frequency_dimensions_are_slow_pairs_and_unrotated_ones(
    wavelengths, unrotated, shortest, at_least
):
    half = len(wavelengths)
    of_pairs = 2 * math.pi / torch.tensor(wavelengths, dtype=torch.float64)
    frequencies = torch.cat([of_pairs, of_pairs, torch.zeros(unrotated, dtype=torch.float64)])
    kept = slow_dimensions(frequencies, shortest, at_least)
    pairs = kept[: (len(kept) - unrotated) // 2]
    assert kept == [*pairs, *(pair + half for pair in pairs), *range(2 * half, len(frequencies))]
    assert pairs == sorted(set(pairs))
    assert len(kept) >= min(at_least, len(frequencies))
    slowest_left_out = max((wavelengths[i] for i in range(half) if i not in pairs), default=0)
    assert slowest_left_out <= shortest * (1 + 1e-9)
    # A pair that turns faster is kept only to fill up, and then the slowest first.
    fill = [pair for pair in pairs if wavelengths[pair] < shortest * (1 - 1e-9)]
    assert all(wavelengths[pair] > slowest_left_out for pair in fill)
    assert not fill or len(kept) - 2 < at_least


def make_indexer(index_space, features=(0, 2, 5)):
    torch.manual_seed(0)
    indexer = TokenIndexer(IndexerSettings(4, index_space), 3, 2, list(features))
    for parameter in indexer.parameters():
        parameter.data.normal_()
    return indexer


@pytest.mark.parametrize("index_space", ["pre_rope", "post_rope", "low_frequency"])
def test_each_head_projects_its_own_features(index_space):
    indexer = make_indexer(index_space)
    before, after = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    features = indexer.features(after, lambda _: before)
    source = before if index_space == "pre_rope" else after
    assert torch.equal(features, torch.stack([source[..., i] for i in (0, 2, 5)], -1))
    for project, weight in (
        (indexer.index_queries, indexer.query_weight),
        (indexer.index_keys, indexer.key_weight),
    ):
        projected = project(features)
        assert projected.shape == (2, 3, 7, 4)
        for head in range(3):
            torch.testing.assert_close(
                projected[:, head], torch.einsum("blf,df->bld", features[:, head], weight[head])
            )


@pytest.mark.parametrize(
    ("states", "index"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float16),
    ],
    ids=str,
)
def test_index_states_keep_all_the_bits_that_two_bytes_allow(states, index):
    indexer = make_indexer("pre_rope")
    features = torch.randn(1, 3, 2, 3, dtype=states)
    assert indexer.index_queries(features).dtype == index
    assert indexer.index_keys(features).dtype == index


def test_weights_start_at_zero_and_frozen():
    indexer = TokenIndexer(IndexerSettings(4), 2, 1, [0, 1])
    assert all(not p.any() and not p.requires_grad for p in indexer.parameters())
    assert set(indexer.state_dict()) == {"query_weight", "key_weight"}


def test_shared_keys_have_one_weight_for_each_full_kv_head():
    indexer = TokenIndexer(IndexerSettings(4, shared_keys=True), 6, 2, [0, 1, 3])
    assert indexer.query_weight.shape == (6, 4, 3)
    assert indexer.key_weight.shape == (2, 4, 3)
    assert indexer.index_keys(torch.randn(1, 2, 5, 3)).shape == (1, 2, 5, 4)


def dimensions(family, index_space, min_wavelength=None, **changes):
    model = tiny_model(family, **changes)
    config = sparse_config(model, index_space=index_space)
    settings_ = replace(config.indexer, min_wavelength=min_wavelength)
    make_sparse(model, replace(config, indexer=settings_))
    return model, [module.indexer.feature_dimensions.tolist() for module in headwise_modules(model)]


@pytest.mark.parametrize("index_space", ["pre_rope", "post_rope"])
def test_whole_heads_outside_low_frequency(index_space):
    assert dimensions("llama", index_space)[1] == [list(range(8))] * 2


def test_low_frequency_keeps_pairs_that_do_not_turn_within_the_context():
    # Wavelengths of the four pairs: about 6, 63, 628 and 6,283 tokens.
    model, kept = dimensions("llama", "low_frequency")
    frequencies = headwise_modules(model)[0].rotation.frequencies
    assert (2 * math.pi / frequencies).round().tolist() == [6, 63, 628, 6283] * 2
    assert kept == [[2, 3, 6, 7]] * 2
    assert model.rtpurbo_config.indexer.min_wavelength == 256
    assert dimensions("llama", "low_frequency", 50.0)[1] == [[1, 2, 3, 5, 6, 7]] * 2
    # Never fewer dimensions than the index has.
    assert dimensions("llama", "low_frequency", 1e9)[1] == [[2, 3, 6, 7]] * 2


def test_a_layer_without_rope_is_projected_whole():
    _, kept = dimensions("smollm3", "low_frequency")
    assert kept[1] == list(range(8))
    assert len(kept[0]) < 8


def test_unrotated_dimensions_count_as_slow():
    model, kept = dimensions("phi3", "low_frequency")
    assert headwise_modules(model)[0].rotation.frequencies.count_nonzero() == 4
    assert all(set(range(4, 8)) <= set(row) for row in kept)


def test_gemma_is_measured_by_the_rope_of_its_full_layers():
    model, _ = dimensions("gemma3_text", "low_frequency")
    [layer] = headwise_modules(model)
    expected = model.base_model.rotary_emb.full_attention_inv_freq.double().repeat(2)
    torch.testing.assert_close(layer.rotation.frequencies, expected)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 32,
}


def test_longrope_is_measured_at_the_whole_context_whatever_ran_before():
    changes = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}
    kept = []
    for length in (8, 64):
        model = tiny_model("phi3", **changes, partial_rotary_factor=1.0)
        model(torch.ones(1, length, dtype=torch.int64))
        make_sparse(model, sparse_config(model))
        layer = headwise_modules(model)[0]
        kept.append(layer.indexer.feature_dimensions.tolist())
    expected = 1e4 ** (-torch.arange(4) / 4) / torch.tensor(LONGROPE["long_factor"])
    torch.testing.assert_close(layer.rotation.frequencies.float(), expected.repeat(2))
    assert kept[0] == kept[1]


def test_the_context_of_yarn_is_the_extended_one():
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    model, _ = dimensions("qwen2", "low_frequency", rope_parameters=yarn)
    assert model.rtpurbo_config.indexer.min_wavelength == 1024


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("cohere", {}),
        ("glm", {}),
        ("llama4_text", {"attention_chunk_size": None, "layer_types": ["full_attention"] * 2}),
        ("qwen2", {}),
        ("gpt_neox", {"num_key_value_heads": DROPPED}),
    ],
)
def test_measured_rotations_can_be_undone(family, changes):
    """Interleaved pairs, partial rotation, complex numbers, halves."""
    ids, _ = padded_batch()
    model = any_model(family, **changes)
    seen = []
    with observing(model, seen.append):
        for first in (0, 5):
            positions = torch.arange(ids.shape[1])[None].expand_as(ids) + first
            model(ids, position_ids=positions, use_cache=False)
    views = [view for view in seen if view.layer == 0]
    before = [view.undo_rotation(view.keys) for view in views]
    torch.testing.assert_close(*before, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(views[0].keys, views[1].keys, atol=1e-2)

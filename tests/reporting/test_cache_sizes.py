import json

import pytest
import torch

import rtpurbo
from rtpurbo.config import DEFAULT_CROP_SLACK
from rtpurbo.evaluation.memory import cache_bytes
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.reporting.cache_sizes import cache_sizes, read_cache_shape, stored_tokens
from tests.models.zoo.configurations import EQUAL
from tests.tiny_artifact import save_tiny_artifact, save_tiny_base
from tests.tiny_models import any_model, make_sparse, sparse_config


@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("length", [16, 200])
def test_sizes_are_those_of_the_loaded_models_cache(tmp_path, shared_keys, length):
    base = save_tiny_base(tmp_path / "base")
    folder = save_tiny_artifact(tmp_path / "artifact", base, shared_keys=shared_keys)
    shape = read_cache_shape(folder)
    model, _ = rtpurbo.load(folder, dtype=torch.float32)
    config = ArtifactConfig.read(folder).config
    sparse, dense = cache_sizes(config, shape, length)
    assert dense == cache_bytes(model, length, dense=True)
    # The difference is the cache's table of positions, one for all heads.
    slots = config.attention.num_sink_tokens + config.attention.sliding_window + DEFAULT_CROP_SLACK
    assert 0 <= cache_bytes(model, length) - sparse <= 12 * slots


def test_without_a_configuration_only_stored_tokens_are_known(tiny_artifact, tmp_path):
    assert read_cache_shape(tmp_path) is None
    sparse, dense = stored_tokens(ArtifactConfig.read(tiny_artifact).config, 1000)
    assert 0 < sparse < dense


@pytest.mark.parametrize(
    "name", ["Gemma 4", "Gemma 4, heads by layer", "Qwen3.5", "LFM2", "Falcon-H1", "GPT-BigCode"]
)
@pytest.mark.parametrize("length", [6, 100])
def test_layers_may_differ_or_have_no_attention(tmp_path, name, length):
    model_type, changes = EQUAL[name]
    model = any_model(model_type, **changes)
    make_sparse(model, sparse_config(model))
    model.save_pretrained(tmp_path)
    config = ArtifactConfig.read(tmp_path).config
    sparse, dense = cache_sizes(config, read_cache_shape(tmp_path), length)
    # transformers keeps a token less than the window in the layers that are not converted.
    windowed = length >= 8 and name == "Gemma 4"
    difference = dense - cache_bytes(model, length, dense=True)
    assert difference == (2 * 2 * 3 * 8 * 4 if windowed else 0)
    slots = config.attention.num_sink_tokens + config.attention.sliding_window + DEFAULT_CROP_SLACK
    assert 0 <= cache_bytes(model, length) - sparse <= 12 * slots + difference


@pytest.mark.parametrize(
    "damage",
    [
        {"per_layer_config": [1]},
        {"per_layer_config": {"x": {}, "0": 5, "1": {"head_dim": "wide"}}},
        {"layer_types": 5},
        {"layer_types": [["full_attention"]]},
        {"num_key_value_heads": "three"},
    ],
    ids=str,
)
def test_unknown_sizes_change_nothing(tiny_artifact, tmp_path, damage):
    data = json.loads((tiny_artifact / "config.json").read_text())
    data["base_config"] |= damage
    (tmp_path / "config.json").write_text(json.dumps(data))
    config = ArtifactConfig.read(tiny_artifact).config
    expected = cache_sizes(config, read_cache_shape(tiny_artifact), 100)
    assert cache_sizes(config, read_cache_shape(tmp_path), 100) == expected

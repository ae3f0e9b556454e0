import pytest
import torch

import rtpurbo
from rtpurbo.evaluation.memory import cache_bytes
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.models.cache import DEFAULT_CROP_SLACK
from rtpurbo.reporting.cache_sizes import cache_sizes, read_cache_shape, stored_tokens
from tests.tiny_artifact import save_tiny_artifact, save_tiny_base


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

import json

import pytest

from rtpurbo.config import AttentionRule
from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact_config import CHECKPOINT_KEY, MODEL_CONFIG_FILE
from rtpurbo.serving.capacity import GIB, Capacity, capacity_of
from rtpurbo.serving.export import export
from tests.tiny_artifact import save_tiny_artifact


@pytest.fixture(scope="module")
def checkpoint(tiny_artifact, tmp_path_factory):
    """Six query and three KV heads of 8 dimensions in two layers; one KV head is full."""
    return export(tiny_artifact, tmp_path_factory.mktemp("capacity") / "vllm", "vllm")


def test_the_dense_models_tokens_are_counted_by_hand(checkpoint):
    found = capacity_of(checkpoint, GIB, in_flight=64)
    # 2 layers of 3 KV heads, key and value, 8 dimensions of 2 bytes.
    assert found.dense_tokens == GIB // (2 * 3 * 2 * 8 * 2)
    assert found.request_tokens == 1024
    assert found.tokens > found.dense_tokens


def test_types_of_twice_the_size_halve_both(checkpoint):
    half = capacity_of(checkpoint, GIB, in_flight=64)
    single = capacity_of(checkpoint, GIB, in_flight=64, dtype="float32")
    assert single.dense_tokens == half.dense_tokens // 2
    assert single.tokens == pytest.approx(half.tokens / 2, rel=0.01)


def test_a_float8_cache_holds_nearly_twice_as_much(checkpoint):
    half = capacity_of(checkpoint, GIB, in_flight=64)
    quarter = capacity_of(checkpoint, GIB, in_flight=64, kv_cache_dtype="fp8")
    assert quarter.dense_tokens == 2 * half.dense_tokens
    # Index keys keep their dtype.
    assert 1.5 * half.tokens < quarter.tokens < 2 * half.tokens


def test_a_shared_index_key_leaves_room_for_more_tokens(tiny_base, tmp_path):
    tokens = {}
    for shared_keys in (False, True):
        folder = tmp_path / str(shared_keys)
        artifact = save_tiny_artifact(
            folder / "artifact", tiny_base, range(6), shared_keys=shared_keys
        )
        checkpoint = export(artifact, folder / "vllm", "vllm")
        tokens[shared_keys] = capacity_of(checkpoint, GIB, in_flight=64).tokens
    # Of each KV head, key and value of 8 dimensions, and an index key of 4 of each of its two query heads.
    assert tokens[True] / tokens[False] == pytest.approx((16 + 2 * 4) / (16 + 4), rel=0.001)


def test_tokens_in_flight_and_short_requests_cost_capacity(checkpoint):
    best = capacity_of(checkpoint, GIB, in_flight=64)
    assert capacity_of(checkpoint, GIB, in_flight=512).tokens < best.tokens
    # A request that is shorter than the window has nothing to forget.
    short = capacity_of(checkpoint, GIB, in_flight=64, max_model_len=AttentionRule().block_size)
    assert short.tokens <= short.dense_tokens < best.tokens


def test_devices_hold_as_many_more_tokens(checkpoint):
    one = capacity_of(checkpoint, GIB, in_flight=64)
    three = capacity_of(checkpoint, GIB, in_flight=64, tensor_parallel_size=3)
    assert three.dense_tokens == pytest.approx(3 * one.dense_tokens, abs=3)
    with pytest.raises(RTPurboError, match="cannot be divided among 2 ranks"):
        capacity_of(checkpoint, GIB, in_flight=64, tensor_parallel_size=2)


def test_heads_without_a_size_of_their_own_share_the_hidden_size(checkpoint, tmp_path):
    config = json.loads((checkpoint / MODEL_CONFIG_FILE).read_text())
    del config["head_dim"]  # some families leave it out: 48 / 6 is 8 as well
    (tmp_path / MODEL_CONFIG_FILE).write_text(json.dumps(config))
    assert capacity_of(tmp_path, GIB, in_flight=64) == capacity_of(checkpoint, GIB, in_flight=64)
    del config[CHECKPOINT_KEY]
    (tmp_path / MODEL_CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(RTPurboError, match="not an rtpurbo artifact"):
        capacity_of(tmp_path, GIB, in_flight=64)


def test_the_capacity_is_described_in_one_sentence():
    assert str(Capacity(GIB // 2, 8192, 30_000, 10_000)) == (
        "0.5 GiB of cache holds 30,000 tokens of context in requests of 8,192, 3.0 times the dense "
        "model's 10,000."
    )

"""Keys and values stored as float8: answers are those of transformers with rounded keys and values."""

import json

import pytest
import torch
from safetensors.torch import save_file

from rtpurbo.serving.capacity import capacity_of
from rtpurbo.serving.export import _index_shards
from tests.vllm.checkpoints import (
    FLOAT8_TIE,
    LAYERS,
    NEW,
    assert_same_answers,
    expected_answers,
    load_reference,
    save_checkpoint,
)
from tests.vllm.engines import (
    answers,
    assert_same_answers_twice,
    running,
    scheduler,
)

pytestmark = pytest.mark.vllm

# Exact in float32.
KEY_SCALE, VALUE_SCALE = 3 / 128, 3 / 512


def test_chunks_and_prefix_hits(llama, reference, prompts, expected, round_cache):
    round_cache(1.0, 1.0)
    wanted = expected_answers(reference, prompts, NEW)
    assert wanted != expected
    with running(llama, kv_cache_dtype="fp8", max_num_batched_tokens=128) as llm:
        context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        pages = context["rtpurbo.0"].pages[0]
        assert pages.keys.dtype == pages.values.dtype == torch.float8_e4m3fn
        assert pages.index_keys.dtype == torch.float32
        _, second = assert_same_answers_twice(llm, reference, prompts, wanted, tie=FLOAT8_TIE)
        assert all(output.num_cached_tokens for output in second[1:5])


def test_compiled_with_dense_queries_at_the_end_of_prompts(tmp_path, prompts, round_cache):
    checkpoint = save_checkpoint(
        tmp_path,
        "qwen3",
        index_space="pre_rope",
        rule={"dense_prompt_queries": 24, "index_storage": "float8"},
    )
    reference = load_reference(checkpoint)
    round_cache(1.0, 1.0)
    wanted = expected_answers(reference, prompts, NEW)
    with running(checkpoint, kv_cache_dtype="fp8_e4m3", enforce_eager=False) as llm:
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), wanted, FLOAT8_TIE)


def test_scales_of_the_checkpoint(tmp_path, prompts, round_cache):
    checkpoint = save_checkpoint(tmp_path)
    reference = load_reference(checkpoint)
    scales = {}
    for layer in range(len(LAYERS)):
        scales[f"model.layers.{layer}.self_attn.k_scale"] = torch.tensor([KEY_SCALE])
        scales[f"model.layers.{layer}.self_attn.v_scale"] = torch.tensor([VALUE_SCALE])
    save_file(scales, checkpoint / "scales.safetensors")
    _index_shards(checkpoint)
    change_scheme(checkpoint, "tensor")
    round_cache(1.0, 1.0)
    unscaled = expected_answers(reference, prompts, NEW)
    round_cache(KEY_SCALE, VALUE_SCALE)
    wanted = expected_answers(reference, prompts, NEW)
    assert wanted != unscaled
    # The dtype follows from the checkpoint.
    with running(checkpoint) as llm:
        assert llm.llm_engine.vllm_config.cache_config.cache_dtype == "fp8"
        assert_same_answers(reference, prompts, answers(llm, prompts, NEW), wanted, FLOAT8_TIE)


def change_scheme(checkpoint, strategy):
    """Adds a scheme of compressed-tensors that quantises the cache only."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "config_groups": {},
        "ignore": [],
        "kv_cache_scheme": {
            "num_bits": 8, "type": "float", "strategy": strategy, "dynamic": False, "symmetric": True
        },
    }  # fmt: skip
    path.write_text(json.dumps(config))


def test_scales_by_head_are_refused(tmp_path):
    checkpoint = save_checkpoint(tmp_path)
    change_scheme(checkpoint, "attn_head")
    with pytest.raises(Exception, match="but one scale per layer"), running(checkpoint):
        pass


def test_capacity(tmp_path):
    options = {"max_model_len": 8192, "max_num_batched_tokens": 512}
    checkpoint = save_checkpoint(
        tmp_path, rule={"sliding_window": 1024}, max_position_embeddings=8192
    )
    found = {}
    for dtype in ("auto", "fp8"):
        with running(checkpoint, dtype="bfloat16", kv_cache_dtype=dtype, **options) as llm:
            cache = llm.llm_engine.vllm_config.cache_config
            found[dtype] = cache.kv_cache_size_tokens
            assert scheduler(llm).kv_cache_config.num_blocks > 0
        predicted = capacity_of(checkpoint, 2**30, in_flight=512, kv_cache_dtype=dtype)
        assert abs(found[dtype] / predicted.tokens - 1) < 0.001
    # Index keys keep their dtype.
    assert 1.7 < found["fp8"] / found["auto"] < 2

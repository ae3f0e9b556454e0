"""Unsupported models and settings are refused in one sentence, before or while they are loaded."""

import json
import shutil

import pytest
import vllm
from safetensors.torch import load_file, save_file

from rtpurbo.errors import RTPurboError
from tests.vllm.checkpoints import HEAVY_HITTERS, change_config, save_checkpoint
from tests.vllm.engines import running

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def checkpoint(sound, tmp_path):
    """A copy, to be damaged."""
    return shutil.copytree(sound, tmp_path / "export")


def refused(checkpoint, sentence, **options):
    with pytest.raises(Exception, match=sentence) as caught, running(checkpoint, **options):
        pass
    return caught.value


def change_indexer(checkpoint, change):
    path = checkpoint / "indexer.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    index = checkpoint / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    missing = {name for name in places["weight_map"] if "indexer" in name} - set(weights)
    for name in missing:
        del places["weight_map"][name]
    index.write_text(json.dumps(places))


def test_missing_indexer_tensor(checkpoint):
    name = "model.layers.2.self_attn.indexer.key_weight"
    change_indexer(checkpoint, lambda weights: weights.pop(name))
    error = refused(checkpoint, f"the checkpoint lacks the tensor '{name}'")
    assert isinstance(error, RTPurboError)


def test_indexer_tensor_of_another_shape(checkpoint):
    name = "model.layers.0.self_attn.indexer.query_weight"

    def shorten(weights):
        weights[name] = weights[name][:1].clone()

    change_indexer(checkpoint, shorten)
    assert isinstance(refused(checkpoint, "expected \\(3, 8, "), RTPurboError)


def test_head_map_of_another_length(checkpoint):
    entry = json.loads((checkpoint / "config.json").read_text())["rtpurbo"]["head_map"]
    change_config(checkpoint, head_map={**entry, "retrieval_heads": entry["retrieval_heads"][:3]})
    error = refused(checkpoint, "the head map belongs to another model")
    assert isinstance(error, RTPurboError)


def test_another_format(checkpoint):
    change_config(checkpoint, format_version=2)
    error = refused(checkpoint, "the checkpoint has format version 2, but this rtpurbo reads 1")
    assert isinstance(error, RTPurboError)


def test_incomplete_configuration(checkpoint):
    change_config(checkpoint, attention=None)
    assert isinstance(refused(checkpoint, "the configuration is not complete"), RTPurboError)


def test_no_configuration(checkpoint):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    del config["rswa_window"]
    path.write_text(json.dumps(config))
    error = refused(checkpoint, "lacks the entry 'rtpurbo' or 'rswa_window'")
    assert isinstance(error, RTPurboError)


def test_prompts_that_share_lists(checkpoint):
    entry = json.loads((checkpoint / "config.json").read_text())["rtpurbo"]["attention"]
    change_config(checkpoint, attention={**entry, "prefill_mode": "row_peak"})
    assert isinstance(
        refused(checkpoint, "prefill_mode 'row_peak' shares block lists"), RTPurboError
    )


@pytest.mark.parametrize("version", ["0.31.4", "0.34.0", "1.0.0.dev3"])
def test_another_vllm(version, sound, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", version)
    error = refused(sound, f"but vLLM {version} is installed: install vllm==0.33")
    assert isinstance(error, RTPurboError)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {
                "speculative_config": {
                    "method": "ngram_gpu",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 3,
                }
            },
            "speculative decoding by 'ngram_gpu' needs",
        ),
        ({"enable_lora": True}, "LoRA adapters change the queries and keys"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "leave out --kv-cache-dtype fp8_e5m2, or choose fp8"),
        (
            {"kv_cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["0"]},
            "leave out --kv-cache-dtype-skip-layers",
        ),
        ({"disable_hybrid_kv_cache_manager": True}, "caches of different sizes"),
        ({"kv_offloading_size": 1.0}, "which connectors do not know"),
        ({"runner": "pooling"}, "give no embeddings"),
        # vLLM says this itself.
        ({"pipeline_parallel_size": 2}, "[Pp]ipeline"),
    ],
)
def test_settings(options, sentence, sound):
    refused(sound, sentence, **options)


@pytest.mark.parametrize(
    "options", [{"max_num_batched_tokens": 16}, {"long_prefill_token_threshold": 1}]
)
def test_prompts_token_by_token(options, checkpoint):
    entry = json.loads((checkpoint / "config.json").read_text())["rtpurbo"]["attention"]
    change_config(checkpoint, attention=entry | HEAVY_HITTERS)
    refused(checkpoint, "choose --max-num-batched-tokens above --max-num-seqs", **options)


def test_a_draft_model(sound):
    draft = {"method": "draft_model", "model": str(sound), "num_speculative_tokens": 2}
    refused(sound, "speculative decoding by 'draft_model' needs", speculative_config=draft)


def test_a_layout_from_the_environment(sound, monkeypatch):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", "LBNHC")
    refused(sound, "unset VLLM_KV_CACHE_LAYOUT")

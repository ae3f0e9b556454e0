import json
import stat
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import rtpurbo
from rtpurbo.config import RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact_config import (
    CONFIG_FILE,
    FORMAT_VERSION,
    INDEXER_FILE,
    MODEL_CONFIG_FILE,
    ArtifactConfig,
)
from rtpurbo.models.sparsify import restore
from rtpurbo.models.stage2_weights import ADAPTER_FOLDER
from rtpurbo.serving.export import HEADWISE_FILE, VLLM_ARCHITECTURES, export
from tests.tiny_artifact import save_tiny_artifact, save_tiny_base
from tests.tiny_models import FAMILIES
from tests.tiny_tokenizer import CHAT_TEMPLATE

VLLM_FAMILIES = ["gemma3_text", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe"]
STANDALONE = ["vllm", "transformers"]


def config_of(folder):
    return json.loads((folder / MODEL_CONFIG_FILE).read_text())


def logits(model):
    return model(torch.arange(100, 180)[None], use_cache=False).logits


def family_artifact(folder, family):
    base = save_tiny_base(folder / "base", family=family)
    stage2 = "full" if family in ("phi3", "qwen3_moe") else "lora"
    return save_tiny_artifact(folder / "artifact", base, heads=(1, 4), stage2=stage2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_survives_without_its_base_model(tmp_path, family):
    artifact = family_artifact(tmp_path, family)
    sparse, _ = rtpurbo.load(artifact)
    targets = STANDALONE if family in VLLM_FAMILIES else ["transformers"]
    folders = {target: export(artifact, tmp_path / target, target) for target in targets}
    (tmp_path / "base").rename(tmp_path / "gone")

    for folder in folders.values():
        again, tokenizer = rtpurbo.load(folder)
        assert torch.equal(logits(again), logits(sparse))
        assert again.rtpurbo_config == sparse.rtpurbo_config
        assert tokenizer.chat_template == CHAT_TEMPLATE
    expected = {"transformers": logits(sparse), "vllm": logits(restore(sparse))}
    for target, folder in folders.items():
        # transformers knows nothing of a checkpoint for vLLM but its dense model.
        plain = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
        assert torch.equal(logits(plain.eval()), expected[target])


@pytest.mark.parametrize("target", STANDALONE)
@pytest.mark.parametrize("kind", ["none", "lora", "full"])
def test_stage2_of_every_kind_is_merged(tiny_base, tmp_path, kind, target):
    artifact = save_tiny_artifact(tmp_path / "artifact", tiny_base, stage2=kind)
    folder = export(artifact, tmp_path / "export", target)
    assert not (folder / ADAPTER_FOLDER).exists()
    assert torch.equal(logits(rtpurbo.load(folder)[0]), logits(rtpurbo.load(artifact)[0]))
    assert ArtifactConfig.read(folder).stage2 == "merged"
    base = ArtifactConfig.read(artifact).base
    assert ArtifactConfig.read(folder).base == replace(base, name=tiny_base.name)


def test_a_log_gets_no_bars(tiny_artifact, tmp_path, capfd):
    export(tiny_artifact, tmp_path / "vllm", "vllm")
    assert capfd.readouterr() == ("", "")


def test_a_checkpoint_for_vllm_has_what_an_engine_needs(tiny_artifact, tmp_path):
    folder = export(tiny_artifact, tmp_path / "vllm", "vllm")
    config, artifact = config_of(folder), ArtifactConfig.read(tiny_artifact)
    assert config["architectures"] == ["RTPurboLlamaForCausalLM"]
    assert config["rswa_window"] == 1
    assert config["rtpurbo"]["format_version"] == FORMAT_VERSION
    assert RTPurboConfig.from_dict(config["rtpurbo"]) == artifact.config

    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    stored = {}
    for name in sorted(set(index.values())):
        stored |= load_file(folder / name)
    assert stored.keys() == index.keys()
    for name, weight in load_file(tiny_artifact / INDEXER_FILE).items():
        layer, _, kind = name.removeprefix("layers.").split(".")
        assert torch.equal(stored[f"model.layers.{layer}.self_attn.indexer.{kind}"], weight)


@pytest.mark.parametrize("target", STANDALONE)
def test_shared_index_keys_stay_shared(tiny_base, tmp_path, target):
    artifact = save_tiny_artifact(tmp_path / "artifact", tiny_base, (0, 1, 4), shared_keys=True)
    folder = export(artifact, tmp_path / "export", target)
    assert ArtifactConfig.read(folder).config.indexer.shared_keys
    weights = load_file(folder / INDEXER_FILE).values()
    assert sorted({len(weight) for weight in weights}) == [2, 3]
    assert torch.equal(logits(rtpurbo.load(folder)[0]), logits(rtpurbo.load(artifact)[0]))


def test_transformers_loads_a_transformers_export_as_the_sparse_model(tiny_artifact, tmp_path):
    folder = export(tiny_artifact, tmp_path / "export", "transformers")
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(model), logits(rtpurbo.load(tiny_artifact)[0]))
    # Programs that do not know rtpurbo must not take it for a dense model.
    assert "rtpurbo" in config_of(folder)["model_type"]
    assert config_of(folder)["base_config"]["model_type"] == "llama"


@pytest.mark.parametrize("target", STANDALONE)
def test_large_models_are_divided_into_files(tiny_artifact, tmp_path, target):
    folder = export(tiny_artifact, tmp_path / "shards", target, max_shard_size="100KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    expected = logits(rtpurbo.load(tiny_artifact)[0])
    assert torch.equal(logits(rtpurbo.load(folder)[0]), expected)


def test_tokenizer_and_generation_settings_are_saved(tmp_path):
    base = save_tiny_base(tmp_path / "base")
    GenerationConfig(eos_token_id=2, do_sample=True, temperature=0.3).save_pretrained(base)
    artifact = save_tiny_artifact(tmp_path / "artifact", base)
    folder = export(artifact, tmp_path / "export", "vllm")
    settings = GenerationConfig.from_pretrained(folder)
    assert (settings.eos_token_id, settings.temperature) == (2, 0.3)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("magic numbers") == AutoTokenizer.from_pretrained(base)("magic numbers")


def test_written_files_have_usual_permissions(tiny_artifact, tmp_path):
    folder = export(tiny_artifact, tmp_path / "export", "vllm")
    assert all(path.stat().st_mode & stat.S_IROTH for path in folder.iterdir())


def test_the_type_of_the_weights_can_be_chosen(tiny_artifact, tmp_path):
    folder = export(tiny_artifact, tmp_path / "half", "vllm", dtype=torch.bfloat16)
    assert config_of(folder)["dtype"] == "bfloat16"
    kept = load_file(folder / "model.safetensors")
    assert {weight.dtype for weight in kept.values()} == {torch.bfloat16}
    expected, _ = rtpurbo.load(tiny_artifact, dtype=torch.bfloat16)
    assert torch.equal(logits(rtpurbo.load(folder, dtype="auto")[0]), logits(expected))
    # Indexers lose nothing.
    assert {weight.dtype for weight in load_file(folder / INDEXER_FILE).values()} == {torch.float32}


@pytest.mark.parametrize("target", STANDALONE)
def test_an_export_can_be_exported_again(tiny_artifact, tmp_path, target):
    first = export(tiny_artifact, tmp_path / "first", "vllm")
    second = export(first, tmp_path / "second", target)
    direct = export(tiny_artifact, tmp_path / "direct", target)
    assert config_of(second) == config_of(direct)
    for path in direct.iterdir():
        assert (second / path.name).read_bytes() == path.read_bytes(), path.name


def test_rtp_llm_reads_the_same_heads_and_windows(tiny_artifact, tmp_path):
    folder = export(tiny_artifact, tmp_path / "rtp", "rtp-llm", sequence_threshold=64)
    assert not (folder / INDEXER_FILE).exists()
    assert not (folder / CONFIG_FILE).exists()
    config = ArtifactConfig.read(tiny_artifact).config
    headwise = config_of(folder)["headwise_config"]
    assert headwise["seqlen_threshold"] == 64
    assert headwise["sink_token_num"] == config.attention.num_sink_tokens
    # RTP-LLM shows a local head the keys with query - key <= n; ours are sliding_window keys.
    query = 200
    seen = [key for key in range(query + 1) if query - key <= headwise["swa_token_num"]]
    assert len(seen) == config.attention.sliding_window
    assert headwise["0"] == headwise["1"] == [1, 1, 0, 0, 0, 0]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(plain), logits(restore(rtpurbo.load(tiny_artifact)[0])))


def test_layers_without_retrieval_heads_are_local_for_rtp_llm_and_windowed_ones_are_left_out(
    tmp_path,
):
    base = save_tiny_base(tmp_path / "base", family="gemma3_text")
    artifact = save_tiny_artifact(tmp_path / "artifact", base, heads=())
    folder = export(artifact, tmp_path / "rtp", "rtp-llm")
    headwise = config_of(folder)["headwise_config"]
    assert {key for key in headwise if key.isdigit()} == {"1"}
    assert headwise["1"] == [0] * 6


def test_the_head_map_alone_needs_no_base_model(tiny_base, tmp_path):
    artifact = save_tiny_artifact(tmp_path / "artifact", tiny_base)
    data = json.loads((artifact / CONFIG_FILE).read_text())
    data["base_model"]["name"] = str(tmp_path / "nowhere")
    (artifact / CONFIG_FILE).write_text(json.dumps(data))
    folder = export(artifact, tmp_path / "map", "rtp-llm", head_map_only=True)
    assert [path.name for path in folder.iterdir()] == [HEADWISE_FILE]
    headwise = json.loads((folder / HEADWISE_FILE).read_text())["headwise_config"]
    assert headwise["0"] == [1, 1, 0, 0, 0, 0]
    with pytest.raises(RTPurboError, match="only an export for rtp-llm"):
        export(artifact, tmp_path / "other", "vllm", head_map_only=True)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(VLLM_FAMILIES)))
def test_vllm_does_not_run_every_family(tmp_path, family):
    artifact = save_tiny_artifact(
        tmp_path / "artifact", save_tiny_base(tmp_path / "base", family=family)
    )
    with pytest.raises(RTPurboError, match=f"does not run on vLLM.*{VLLM_ARCHITECTURES[0]}"):
        export(artifact, tmp_path / "vllm", "vllm")
    assert not (tmp_path / "vllm").exists()


@pytest.mark.parametrize(
    "architecture", ["Qwen3_5ForCausalLM", "Qwen3_5MoeForCausalLM", "Qwen3NextForCausalLM"]
)
def test_vllm_does_not_run_recurrent_layers(architecture, tmp_path):
    artifact = save_tiny_artifact(tmp_path / "artifact", save_tiny_base(tmp_path / "base"))
    file = artifact / CONFIG_FILE
    config = json.loads(file.read_text())
    config["base_model"]["architecture"] = architecture
    file.write_text(json.dumps(config))
    message = f"{architecture} does not run on vLLM .* the states of its linear_attention layers"
    with pytest.raises(RTPurboError, match=message):
        export(artifact, tmp_path / "vllm", "vllm")


def test_vllm_does_not_run_every_family_with_windows_of_its_own(tmp_path):
    types = ["sliding_attention", "full_attention"]
    windows = {"use_sliding_window": True, "sliding_window": 8, "layer_types": types}
    base = save_tiny_base(tmp_path / "base", family="qwen3", **windows)
    artifact = save_tiny_artifact(tmp_path / "artifact", base)
    with pytest.raises(RTPurboError, match="had a sliding window before conversion"):
        export(artifact, tmp_path / "vllm", "vllm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prefill_mode": "row_peak"},
            "'row_peak' shares block lists .* change it to 'dense' in the artifact's",
        ),
        (
            {"num_heavy_hitters": 2, "dense_prompt_queries": 4},
            "needs one of at least 78: set num_heavy_hitters to 0 in the artifact's",
        ),
    ],
)
def test_vllm_does_not_support_every_rule(tmp_path, changes, message):
    base = save_tiny_base(tmp_path / "base")
    artifact = save_tiny_artifact(tmp_path / "artifact", base)
    file = artifact / CONFIG_FILE
    config = json.loads(file.read_text())
    config["config"]["attention"] |= changes
    file.write_text(json.dumps(config))
    with pytest.raises(RTPurboError, match=message):
        export(artifact, tmp_path / "vllm", "vllm")
    export(artifact, tmp_path / "transformers", "transformers")


def test_nothing_is_written_after_a_failure(tiny_artifact, tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").write_text("keep me")
    with pytest.raises(RTPurboError, match="exists already"):
        export(tiny_artifact, taken, "vllm")

    def fail(*arguments):
        raise OSError("the cable")

    monkeypatch.setattr("rtpurbo.serving.export._index_shards", fail)
    with pytest.raises(OSError, match="the cable"):
        export(tiny_artifact, taken, "vllm", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert (taken / "file").read_text() == "keep me"


def test_stage2_cannot_be_taken_out_again(tiny_artifact, tmp_path):
    folder = export(tiny_artifact, tmp_path / "export", "transformers")
    with pytest.raises(RTPurboError, match="load the artifact that it was made from"):
        rtpurbo.load(folder, stage2=False)


def test_unknown_targets_and_broken_indexers_are_refused(tiny_artifact, tmp_path):
    with pytest.raises(RTPurboError, match=r"target is 'ollama', .* vllm, rtp-llm, transformers"):
        export(tiny_artifact, tmp_path / "x", "ollama")
    folder = export(tiny_artifact, tmp_path / "export", "vllm")
    (folder / INDEXER_FILE).unlink()
    with pytest.raises(RTPurboError, match=r"indexer\.safetensors is missing"):
        export(folder, tmp_path / "again", "transformers")

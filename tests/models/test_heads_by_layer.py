"""Models whose layers differ in the numbers and sizes of their heads, from calibration to a loaded artifact."""

import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache

import rtpurbo
from rtpurbo.config import AttentionRule, IndexerSettings
from rtpurbo.conversion import calibrate, convert, plan_conversion
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.memory import cache_bytes, full_key_bytes
from rtpurbo.evaluation.policies import random_head_map
from rtpurbo.evaluation.reads import metering
from rtpurbo.models.artifact_config import CONFIG_FILE, LOG_FILE, ArtifactConfig
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.probe import probe
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import empty_head_map, restore, sparsify
from rtpurbo.reporting.cache_sizes import cache_sizes, read_cache_shape
from rtpurbo.reporting.html.sections.head_map import head_map_section
from rtpurbo.reporting.html.sources import read_sources
from rtpurbo.reporting.inspection import inspect_artifact
from rtpurbo.serving.export import export
from rtpurbo.serving.rtp_llm import headwise_config
from rtpurbo.settings import (
    CalibrationSettings,
    ConversionSettings,
    DistillationSettings,
    IndexerTrainingSettings,
)
from rtpurbo.training.log import TrainingLog
from tests.models.zoo.configurations import EQUAL, HEADS_BY_LAYER
from tests.ops.triton.support import DEVICE, DTYPES
from tests.tiny_models import (
    any_model,
    assert_same_logits,
    logits_of,
    make_sparse,
    padded_batch,
    sparse_config,
)
from tests.tiny_tokenizer import tiny_tokenizer

# Query heads, KV heads and size of a head, of the layers that are converted.
SHAPES = {
    "Gemma 4, heads by layer": {0: (6, 3, 8), 1: (6, 2, 16), 2: (6, 3, 8), 3: (6, 2, 16)},
    "Laguna, heads by layer": {1: (3, 3, 8), 3: (12, 3, 8)},
}
SETTINGS = ConversionSettings(
    attention=AttentionRule(sliding_window=64, min_tokens=8, block_size=16),
    indexer=IndexerSettings(index_dim=4),
    calibration=CalibrationSettings(length=384, num_documents=2, ratio=0.5),
    stage1=IndexerTrainingSettings(
        steps=30, lengths=(800,), steps_per_sequence=8, queries_per_step=32, warmup_steps=2,
        init_sequences=1, probe_sequences=1, probe_every=15,
    ),
    stage2=DistillationSettings(steps=0),
)  # fmt: skip
LENGTH = 100


def model_of(name, **changes):
    model_type, own = EQUAL[name]
    return any_model(model_type, **{**own, **changes})


def sparse(name, **options):
    model = model_of(name)
    return make_sparse(model, sparse_config(model, (0, 2, 5), **options))


@pytest.fixture(params=HEADS_BY_LAYER, scope="module")
def base(request, tmp_path_factory):
    """A saved model of each type, with a context long enough for calibration."""
    folder = tmp_path_factory.mktemp("base")
    changes = {"vocab_size": 512, "max_position_embeddings": 1024}
    if request.param.startswith("Gemma"):
        # As long as the context, so that these layers are converted too.
        changes["sliding_window"] = 1024
    model_of(request.param, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return request.param, folder


@pytest.fixture(scope="module")
def artifact(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "artifact"
    return convert(str(base[1]), folder, settings=SETTINGS, device="cpu")


@pytest.mark.parametrize("name", HEADS_BY_LAYER)
def test_the_probe_finds_the_heads_of_each_layer(name):
    model = model_of(name)
    found = {
        layer: (traits.num_attention_heads, traits.num_key_value_heads, traits.head_dim)
        for layer, traits in probe(model).items()
    }
    assert found == SHAPES[name]
    head_map = empty_head_map(model)
    assert head_map.num_heads == sum(heads for heads, _, _ in SHAPES[name].values())
    for layer, (heads, kv_heads, _) in SHAPES[name].items():
        assert head_map.num_query_heads(layer) == heads
        assert head_map.group_size(layer) == heads // kv_heads


def test_a_head_map_with_other_heads_in_one_layer_is_refused():
    model = model_of("Laguna, heads by layer")
    config = sparse_config(model)
    wrong = replace(config.head_map, num_attention_heads=(None, 3, None, 6))
    with pytest.raises(RTPurboError, match=r"6 query heads on 3 KV heads in layer 3.* has 12 on 3"):
        sparsify(model, replace(config, head_map=wrong))


@pytest.mark.parametrize(
    ("ranking", "granularity"),
    [("induction", "query_head"), ("interleaved", "kv_group"), ("gates", "kv_group")],
)
def test_calibration_chooses_among_the_heads_of_all_layers(base, ranking, granularity, tmp_path):
    name, folder = base
    chosen = replace(SETTINGS.calibration, ranking=ranking, granularity=granularity)
    head_map = calibrate(
        str(folder),
        tmp_path / "map.json",
        settings=replace(SETTINGS, calibration=chosen),
        device="cpu",
    )
    wanted = math.ceil(sum(heads for heads, _, _ in SHAPES[name].values()) / 2)
    # The last group may bring more.
    assert wanted <= head_map.num_retrieval_heads < wanted + 4
    for layer, (heads, kv_heads, _) in SHAPES[name].items():
        assert len(head_map.scores[layer]) == heads
        if granularity == "kv_group":
            full = head_map.full_key_value_heads(layer)
            assert len(head_map.retrieval_heads[layer]) == len(full) * heads // kv_heads


def test_indexers_of_all_layers_learn(artifact):
    losses = [entry["loss"] for entry in TrainingLog(artifact / LOG_FILE).entries()]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_an_artifact_loads_as_the_model_that_was_saved(base, artifact):
    name, _ = base
    model, tokenizer = rtpurbo.load(artifact)
    head_map = model.rtpurbo_config.head_map
    stored = json.loads((artifact / CONFIG_FILE).read_text())["config"]["head_map"]
    for entry, place in (("num_attention_heads", 0), ("num_key_value_heads", 1)):
        counts = [
            SHAPES[name][layer][place] if layer in SHAPES[name] else None for layer in range(4)
        ]
        is_equal = len({count for count in counts if count}) == 1
        assert stored[entry] == (max(filter(None, counts)) if is_equal else counts)
    saved = artifact.parent / "saved"
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    again = rtpurbo.AutoRTPurboModelForCausalLM.from_pretrained(saved)
    assert again.rtpurbo_config.head_map == head_map
    ids = torch.arange(2, 202)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert torch.equal(*(m.generate(ids, max_new_tokens=5, pad_token_id=0) for m in (model, again)))


@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("name", HEADS_BY_LAYER)
def test_sizes_of_caches_are_measured(name, shared_keys):
    model = sparse(name, shared_keys=shared_keys)
    ids = torch.arange(LENGTH).remainder(60).expand(2, LENGTH)
    cache = HeadwiseCache(model)
    model(ids, past_key_values=cache, use_cache=True)
    assert cache_bytes(model, LENGTH, 2) == cache.num_bytes()
    head_map, shapes = model.rtpurbo_config.head_map, SHAPES[name]
    full = {layer: len(head_map.full_key_value_heads(layer)) for layer in shapes}
    assert full_key_bytes(model, LENGTH) == LENGTH * 4 * sum(
        full[layer] * head_dim for layer, (_, _, head_dim) in shapes.items()
    )
    restore(model)
    dense = DynamicCache(config=model.config)
    model(ids, past_key_values=dense, use_cache=True)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
    assert cache_bytes(model, LENGTH, 2) == held


def test_an_artifact_is_described_without_its_model(base, artifact):
    name, _ = base
    model, _ = rtpurbo.load(artifact, dtype=torch.float32)
    config, shape = ArtifactConfig.read(artifact).config, read_cache_shape(artifact)
    sparse_size, dense_size = cache_sizes(config, shape, 300)
    # transformers keeps a token less than the window in the layers that are not converted.
    unconverted = (4 - len(SHAPES[name])) * 2 * 3 * 8 * 4
    assert dense_size == cache_bytes(model, 300, dense=True) + unconverted
    assert 0 <= cache_bytes(model, 300) - sparse_size <= 12 * (4 + 64 + 64) * 2
    console = Console(record=True, width=200)
    console.print(inspect_artifact(artifact))
    text = console.export_text()
    kv_heads = sum(kv for _, kv, _ in SHAPES[name].values())
    assert f"{config.head_map.num_full_key_value_heads} of {kv_heads}" in text
    *_, folded = head_map_section(read_sources([artifact])).blocks[:3]
    most = max(heads for heads, _, _ in SHAPES[name].values())
    assert all(len(row) == 1 + most for row in folded.block.rows)
    rtp_llm = headwise_config(config)
    assert {layer: len(rtp_llm[str(layer)]) for layer in SHAPES[name]} == {
        layer: heads for layer, (heads, _, _) in SHAPES[name].items()
    }


def test_an_artifact_is_exported_for_transformers_and_not_for_vllm(artifact, tmp_path):
    expected, _ = rtpurbo.load(artifact)
    export(artifact, tmp_path / "exported", target="transformers")
    ids = torch.arange(2, 202)[None]
    exported, _ = rtpurbo.load(tmp_path / "exported")
    assert torch.equal(exported(ids).logits, expected(ids).logits)
    with pytest.raises(RTPurboError, match=r"vLLM.*serve it with transformers"):
        export(artifact, tmp_path / "served", target="vllm")


def test_a_plan_counts_the_heads_of_all_layers(base):
    name, folder = base
    plan = plan_conversion(str(folder), device="cpu")
    assert plan.num_heads == sum(heads for heads, _, _ in SHAPES[name].values())
    assert plan.num_kv_heads == sum(kv_heads for _, kv_heads, _ in SHAPES[name].values())


@pytest.mark.parametrize("name", HEADS_BY_LAYER)
def test_reads_and_random_heads_follow_the_layers(name):
    model = sparse(name, top_p=1.0, prefill_mode="top_p")
    config, ids = model.rtpurbo_config, torch.arange(2, 62)[None]
    drawn = random_head_map(config.head_map, 0)
    assert drawn.num_retrieval_heads == config.head_map.num_retrieval_heads
    sparsify(model, replace(config, head_map=drawn))
    sparsify(model, replace(config, head_map=empty_head_map(model)))
    with metering(model, config.head_map, {1}) as meter:
        model(ids, use_cache=False)
    reads = meter.reads()
    # Local heads read two sinks and a window of eight tokens at most.
    assert 0 < reads.tokens_mean <= 10
    assert 0 < reads.recall < 1


@pytest.mark.kernels
@pytest.mark.parametrize("name", HEADS_BY_LAYER)
def test_kernels_take_each_layer_with_its_own_heads(name):
    pytest.importorskip("triton")
    rule = {"top_p": 1.0, "block_size": 16, "sliding_window": 16}
    model = sparse(name, **rule).to(DEVICE, DTYPES[-1])
    ids, mask = (part.to(DEVICE) for part in padded_batch((2,), 26))
    outputs = {}
    for backend in ("eager", "triton"):
        for layer in headwise_modules(model):
            layer.backend = backend
        outputs[backend] = logits_of(model, ids, mask, (24, 1, 1))
        assert {layer.used_backend for layer in headwise_modules(model)} == {backend}
    tolerance = 1e-4 if DTYPES[-1] == torch.float32 else 3e-2
    assert_same_logits(outputs["triton"], outputs["eager"], mask, tolerance)

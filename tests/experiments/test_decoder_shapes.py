import json
import sys

import decoder_shapes
import pytest
import torch

from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.speed_records import read_speed

TINY = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "vocab_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
}
TINY_OF = {
    "Qwen3.5-9B": {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "gpt-oss-20b": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 16},
    "GLM-4.5-Air": {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Gemma 4 31B": {
        "global_head_dim": 512,
        "num_global_key_value_heads": 2,
        "sliding_window": 16,
        "vocab_size_per_layer_input": 96,
    },
}


@pytest.fixture
def tiny_shapes(monkeypatch):
    for name, (kind, sizes) in decoder_shapes.SHAPES.items():
        monkeypatch.setitem(decoder_shapes.SHAPES, name, (kind, {**sizes, **TINY, **TINY_OF[name]}))


def run(monkeypatch, tmp_path, *options):
    # The interpreter of kernels would be slow.
    monkeypatch.setattr("rtpurbo.ops.api.interprets_kernels", lambda: False)
    output = tmp_path / "shapes.json"
    command = ["decoder_shapes.py", *options, "--length", "512", "--steps", "3", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(output)])
    decoder_shapes.main()
    return output


def test_every_shape_is_measured_dense_and_sparse(monkeypatch, tmp_path, tiny_shapes):
    output = run(monkeypatch, tmp_path, "--dtype", "float32")
    written = json.loads(output.read_text())
    assert written["notes"] == [f"transformers {decoder_shapes.version('transformers')}."]
    assert written["command"].startswith("python decoder_shapes.py --dtype float32")
    records = read_speed(output).records
    assert len(records) == 5 * len(decoder_shapes.SHAPES)
    for name in decoder_shapes.SHAPES:
        of_shape = [record for record in records if record.model.startswith(name)]
        prefills = [record for record in of_shape if record.phase == "model-prefill"]
        assert [record.implementation for record in prefills][1:] == ["rtpurbo-dense-retrieval"]
        decodes = {r.implementation: r for r in of_shape if r.phase == "model-decode"}
        assert list(decodes)[1:] == ["rtpurbo", "rtpurbo-no-graph"]
        assert decodes["rtpurbo"].density == pytest.approx(0.1, abs=0.15)
        for record in of_shape:
            assert record.dtype == "float32"
            is_sparse = record.implementation.startswith("rtpurbo")
            assert ("backend 'triton' needs a GPU" in (record.note or "")) == is_sparse


def test_head_maps_keep_half_of_the_kv_heads(tiny_shapes):
    model = decoder_shapes.build_model("gpt-oss-20b", torch.float32, torch.device("cpu"))
    head_map = decoder_shapes.half_of_kv_heads(model.config)
    assert head_map.retrieval_heads == (None, (0, 1, 4, 5), None, (0, 1, 4, 5))


def test_the_backend_is_that_of_the_last_forward(tiny_shapes):
    case = decoder_shapes.Case(
        "Gemma 4 31B",
        decoder_shapes.build_model("Gemma 4 31B", torch.float32, torch.device("cpu")),
        80,
        decoder_shapes.AttentionRule(num_sink_tokens=4, sliding_window=64),
    )
    decoder_shapes.sparsify(case.model, decoder_shapes.RTPurboConfig(case.head_map, case.rule))
    case.prompt()()
    reason = case.backend()
    assert reason.startswith("attention on PyTorch operators (backend 'triton' does not support")
    assert "head_dim 512" in reason
    for layer in headwise_modules(case.model):
        assert layer.backend == "auto"
        layer.used_backend = "triton"
    assert case.backend() == "attention on Triton kernels"


def test_a_shape_that_fails_is_reported_and_the_others_are_measured(
    monkeypatch, tmp_path, tiny_shapes
):
    monkeypatch.setitem(decoder_shapes.SHAPES, "GLM-4.5-Air", ("glm4_moe", {"head_dim": -1}))
    output = run(monkeypatch, tmp_path, "GLM-4.5-Air", "gpt-oss-20b")
    results = read_speed(output)
    assert {record.model for record in results.records} == {"gpt-oss-20b, 4 layers"}
    assert any(note.startswith("GLM-4.5-Air: ") for note in json.loads(output.read_text())["notes"])

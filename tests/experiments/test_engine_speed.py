import json
from pathlib import Path

import engine_speed
import pytest
from transformers import AutoConfig

from rtpurbo.serving.vllm.checkpoint import read_config

OUTPUT = ["--output", "engine.json"]


def settings_of(*loads, others=()):
    options = [part for load in loads for part in ("--load", load)]
    return engine_speed.parse([*options, *others, *OUTPUT])


def test_each_length_beyond_the_window_has_a_sparse_engine():
    settings = settings_of("131072x1", "32768x16", "4096", "32768x1")
    load = engine_speed.EngineLoad
    assert settings.context == 131072
    assert engine_speed.engines(settings) == [
        ("full", [load(4096, 1), load(32768, 1), load(32768, 16), load(131072, 1)]),
        ("rtpurbo", [load(4096, 1), load(32768, 1), load(32768, 16)]),
        ("rtpurbo", [load(131072, 1)]),
    ]


def test_configurations(tmp_path):
    settings = settings_of("32768x1", others=["--layers", "2", "--context", "65536"])
    for policy in ("full", "rtpurbo"):
        folder = tmp_path / policy
        folder.mkdir()
        engine_speed.write_config(folder, policy, settings)
    dense, sparse = (
        json.loads(Path(tmp_path / name / "config.json").read_text())
        for name in ("full", "rtpurbo")
    )
    assert "rtpurbo" not in dense
    assert sparse["architectures"] == ["RTPurboQwen3ForCausalLM"]
    read = read_config(AutoConfig.from_pretrained(tmp_path / "rtpurbo"))
    assert read.attention.min_tokens == pytest.approx(0.03 * 32768, abs=1)
    assert read.attention.sliding_window == 8192
    assert read.head_map.num_retrieval_heads == round(0.15 * 2 * 32)


def test_command_lines_of_engines():
    arguments = ["--load", "4096x1", "--mode", "graphs", "--load", "8192x2", "--load=5x1", *OUTPUT]
    assert engine_speed._without_loads(arguments) == ["--mode", "graphs", *OUTPUT]

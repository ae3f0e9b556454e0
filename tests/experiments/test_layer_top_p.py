import pytest
import torch
from layer_top_p import main

import rtpurbo
from rtpurbo.calibration.layer_top_p import TOP_P
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.models.sparse_layers import headwise_modules


@pytest.fixture
def run(monkeypatch, tiny_artifact, tmp_path):
    output = tmp_path / "by-layer"
    arguments = [tiny_artifact, "-o", output, "--device", "cpu", "--sequences", 2, "--length", 512]
    monkeypatch.setattr("sys.argv", ["layer_top_p.py", *map(str, arguments)])
    main()
    return output


def test_the_copy_has_a_top_p_for_each_layer(run, tiny_artifact):
    before, after = (ArtifactConfig.read(folder) for folder in (tiny_artifact, run))
    rule, head_map = after.config.attention, after.config.head_map
    allowed = {*TOP_P, before.config.attention.top_p}
    assert len(rule.layer_top_p) == len(head_map.retrieval_heads)
    assert set(rule.layer_top_p) <= allowed
    assert after.settings["calibration"]["top_p_sequences"] == 2
    assert after.figures["top_p"]["values"] == list(rule.layer_top_p)
    model, _ = rtpurbo.load(str(run))
    for layer in headwise_modules(model):
        assert layer.rule.top_p == rule.layer_top_p[layer.layer_idx]
    with torch.no_grad():
        assert model(torch.arange(2, 40)[None]).logits.isfinite().all()

import json
import shutil

import pytest
import torch

import rtpurbo
from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact import kept_config
from rtpurbo.models.artifact_config import MODEL_CONFIG_FILE
from tests.tiny_artifact import save_tiny_artifact, save_tiny_base
from tests.tiny_models import FAMILIES

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}


def load_over(tiny_base, artifact, folder, **changes):
    base = shutil.copytree(tiny_base, folder)
    path = base / MODEL_CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return rtpurbo.load(artifact, base_model=str(base))[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_parameters", {"rope_type": "default", "rope_theta": 500.0}),
        ("rope_parameters", YARN),
        ("rope_parameters", {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}),
        ("rms_norm_eps", 0.1),
        ("hidden_act", "gelu"),
        ("max_position_embeddings", 4096),
    ],
)
def test_a_base_model_that_computes_otherwise_is_refused(
    tiny_base, tiny_artifact, tmp_path, name, value
):
    with pytest.raises(RTPurboError, match=f"has changed since .* was made: {name}"):
        load_over(tiny_base, tiny_artifact, tmp_path / "base", **{name: value})


def test_settings_that_do_not_change_logits_may_differ(tiny_base, tiny_artifact, tmp_path):
    changes = {
        "use_cache": False,
        "eos_token_id": 7,
        "pad_token_id": 3,
        "transformers_version": "1",
    }
    model = load_over(tiny_base, tiny_artifact, tmp_path / "base", **changes)
    ids = torch.arange(100, 180)[None]
    expected = rtpurbo.load(tiny_artifact)[0](ids).logits
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_base_model_is_never_refused(tmp_path, family):
    base = save_tiny_base(tmp_path / "base", family=family)
    artifact = save_tiny_artifact(tmp_path / "artifact", base, heads=(1, 4))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rtpurbo.load(artifact, dtype=dtype)


def test_an_artifact_from_before_is_not_checked(tiny_base, tiny_artifact, tmp_path):
    artifact = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    (artifact / MODEL_CONFIG_FILE).unlink()
    assert kept_config(artifact) is None
    assert load_over(tiny_base, artifact, tmp_path / "base", rms_norm_eps=0.1)


def test_a_number_rounded_to_float32_is_the_same(tiny_base, tiny_artifact, tmp_path):
    kept = json.loads((tiny_base / MODEL_CONFIG_FILE).read_text())["rms_norm_eps"]
    rounded = torch.tensor(kept, dtype=torch.float32).item()
    assert rounded != kept
    load_over(tiny_base, tiny_artifact, tmp_path / "base", rms_norm_eps=rounded)

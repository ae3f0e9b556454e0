import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import rtpurbo
from rtpurbo.errors import RTPurboError
from rtpurbo.models.stage2_weights import ADAPTER_CONFIG_FILE, ADAPTER_FOLDER, check_adapter
from tests.tiny_artifact import save_tiny_artifact


@pytest.fixture
def artifact(tiny_artifact, tmp_path):
    return shutil.copytree(tiny_artifact, tmp_path / "megatron")


def change(artifact, **changes):
    path = artifact / ADAPTER_FOLDER / ADAPTER_CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_modules_named_by_an_adapter_are_not_imported(artifact, monkeypatch):
    (artifact / "__init__.py").write_text("")
    (artifact / "payload.py").write_text("import builtins; builtins.payload_ran = True")
    change(artifact, megatron_config={"a": 1}, megatron_core="megatron.payload")
    monkeypatch.syspath_prepend(artifact.parent)
    with pytest.raises(RTPurboError, match="sets 'megatron_config'"):
        rtpurbo.load(artifact)
    change(artifact, megatron_config=None)
    with pytest.raises(RTPurboError, match="sets 'megatron_core'"):
        rtpurbo.load(artifact)
    assert "megatron.payload" not in sys.modules
    assert not hasattr(__import__("builtins"), "payload_ran")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "of the kind 'PREFIX_TUNING'"),
        ({"peft_type": None}, "of the kind None"),
        ({"layer_replication": [[0, 1]] * 1000}, "sets 'layer_replication'"),
        ({"auto_mapping": {"parent_library": "os"}}, "sets 'auto_mapping'"),
        ({"modules_to_save": ["lm_head"]}, "sets 'modules_to_save'"),
        ({"use_dora": True}, "sets 'use_dora'"),
        ({"of_a_later_peft": "on"}, "sets 'of_a_later_peft'"),
        ({"lora_alpha": float("nan")}, "sets lora_alpha to nan"),
        ({"r": "2"}, "sets r to '2'"),
        ({"r": 0}, "sets r to 0"),
    ],
)
def test_more_than_a_plain_lora_is_refused(artifact, changes, message):
    change(artifact, **changes)
    with pytest.raises(RTPurboError, match=message):
        rtpurbo.load(artifact)


def test_settings_that_are_off_or_at_their_default_pass(artifact, tiny_artifact):
    path = change(artifact, of_a_later_peft=None, another={}, qalora_group_size=16)
    check_adapter(path)
    ids = torch.arange(100, 180)[None]
    expected = rtpurbo.load(tiny_artifact)[0](ids).logits
    assert torch.equal(rtpurbo.load(artifact)[0](ids).logits, expected)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_broken_configuration_is_named(artifact, content):
    (artifact / ADAPTER_FOLDER / ADAPTER_CONFIG_FILE).write_bytes(content)
    with pytest.raises(RTPurboError, match="json is missing or corrupt"):
        rtpurbo.load(artifact)


def test_the_adapters_of_real_artifacts_pass(tiny_base, tmp_path):
    shipped = list(Path(__file__).parents[2].glob(f"artifacts/*/{ADAPTER_FOLDER}"))
    assert len(shipped) == 2
    made = save_tiny_artifact(tmp_path / "artifact", tiny_base, stage2="lora")
    for folder in [*shipped, made / ADAPTER_FOLDER]:
        check_adapter(folder / ADAPTER_CONFIG_FILE)

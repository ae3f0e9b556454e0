import json
import shutil
from dataclasses import replace

from huggingface_hub import ModelCard

from rtpurbo.config import AttentionRule
from rtpurbo.models.artifact_config import CARD_FILE, LOG_FILE, ArtifactConfig
from rtpurbo.models.base import DEFAULT_MODEL, WHEEL_MODEL
from rtpurbo.reporting.model_card import local_heads, model_card
from rtpurbo.reporting.tables import markdown_tables, rewrite_card
from tests.reporting.test_tables import RECORDS


def artifact_of(tiny_artifact, **base):
    config = ArtifactConfig.read(tiny_artifact)
    return replace(config, base=replace(config.base, **base))


def test_the_hub_understands_the_metadata(tiny_artifact):
    artifact = artifact_of(tiny_artifact, name=DEFAULT_MODEL, source="hub", revision="abc")
    data = ModelCard(model_card(artifact), ignore_metadata_errors=False).data
    assert data.base_model == DEFAULT_MODEL
    assert data.license == "apache-2.0"
    assert data.library_name == "rtpurbo"
    assert data.pipeline_tag == "text-generation"
    assert "sparse-attention" in data.tags


def test_other_licenses_are_not_guessed(tiny_artifact):
    card = model_card(artifact_of(tiny_artifact, name="somebody/model", source="hub"))
    assert ModelCard(card).data.license is None


def test_the_wheel_is_named_by_its_model(tiny_artifact):
    card = model_card(artifact_of(tiny_artifact, name=WHEEL_MODEL, source="wheel"))
    assert ModelCard(card).data.base_model == DEFAULT_MODEL


def test_the_folder_of_a_local_base_is_not_disclosed(tiny_artifact, tiny_base):
    card = model_card(ArtifactConfig.read(tiny_artifact))
    assert str(tiny_base) not in card
    assert ModelCard(card).data.base_model is None
    assert "base_model=" in card


def test_the_card_describes_model_and_conversion(tiny_artifact):
    card = model_card(ArtifactConfig.read(tiny_artifact), markdown_tables(RECORDS), "me/tiny")
    assert 'rtpurbo.load("me/tiny"' in card
    assert markdown_tables(RECORDS) in card
    assert "| Retrieval heads | 4 of 12 (33.3 %) |" in card
    assert "| Full KV heads | 2 of 6 |" in card
    assert "attend to the last 32 keys and the first 2" in card
    assert "stage1 7" in card
    assert "{" not in card.replace("bash", "").split("---", 2)[2]


def test_heavy_hitters_and_dense_prompts_are_named():
    rule = AttentionRule(
        sliding_window=3584, num_sink_tokens=640, num_heavy_hitters=512, dense_prompt_tokens=32768
    )
    assert local_heads(rule) == (
        "attend to the last 3,584 keys and the first 128, and to 512 that the prompt's last queries "
        "attend to most; prompts of up to 32,768 tokens are dense"
    )


def test_a_card_without_results_says_how_to_measure(tiny_artifact):
    card = model_card(ArtifactConfig.read(tiny_artifact))
    assert "rtpurbo eval" in card


def test_rewriting_puts_figures_into_the_artifact(tiny_artifact, tmp_path):
    folder = shutil.copytree(tiny_artifact, tmp_path / "copy")
    rewrite_card(folder, RECORDS)
    assert markdown_tables(RECORDS) in (folder / CARD_FILE).read_text()


def test_the_card_contains_curves(tiny_artifact, tmp_path):
    folder = shutil.copytree(tiny_artifact, tmp_path / "copy")
    entries = [{"stage": "stage1", "step": step, "loss": 4.0 - step} for step in (1, 2, 3)]
    (folder / LOG_FILE).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    rewrite_card(folder, RECORDS)
    assert "stage1 loss  █▅▁  3 → 1" in (folder / CARD_FILE).read_text()
    assert "→" not in model_card(ArtifactConfig.read(folder))

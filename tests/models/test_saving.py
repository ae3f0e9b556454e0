import json
import shutil

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.utils.hub import PushToHubMixin

import rtpurbo
from rtpurbo.models.artifact_config import CONFIG_FILE, INDEXER_FILE, ArtifactConfig
from rtpurbo.models.sparse_layers import indexer_weights, is_sparse
from rtpurbo.models.sparsify import restore
from tests.models.zoo.configurations import EQUAL
from tests.tiny_artifact import save_tiny_artifact, save_tiny_base
from tests.tiny_models import FAMILIES, any_model, make_sparse, sparse_config, tiny_model


def logits(model):
    ids = torch.arange(2, 62)[None]
    return model(ids, use_cache=False).logits


def tiny_sparse(family="llama", **changes):
    model = tiny_model(family, **changes)
    return make_sparse(model, sparse_config(model, prefill_mode="top_p", top_p=0.6))


def check_same(folder, model):
    again = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
    assert is_sparse(again)
    assert again.rtpurbo_config == model.rtpurbo_config
    assert torch.equal(logits(again), logits(model))
    assert not torch.equal(logits(restore(again)), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_writes_the_sparse_model(tmp_path, family):
    model = tiny_sparse(family)
    model.save_pretrained(tmp_path / "saved")
    check_same(tmp_path / "saved", model)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "generation_config.json",
        "indexer.safetensors",
        "model.safetensors",
        "rtpurbo_config.json",
    ]


def test_a_model_whose_configuration_has_strict_parts_is_read_again(tmp_path):
    """DBRX's parts refuse settings that every configuration has, in some versions of transformers."""
    model_type, changes = EQUAL["DBRX"]
    model = any_model(model_type, **changes)
    make_sparse(model, sparse_config(model, prefill_mode="top_p", top_p=0.6))
    model.save_pretrained(tmp_path)
    check_same(tmp_path, model)


def test_a_loaded_artifact_is_saved_with_its_origin(tiny_base, tmp_path):
    artifact = save_tiny_artifact(tmp_path / "artifact", tiny_base, stage2="lora")
    model, tokenizer = rtpurbo.load(artifact)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    check_same(tmp_path / "saved", model)
    again, _ = rtpurbo.load(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    saved, first = ArtifactConfig.read(tmp_path / "saved"), ArtifactConfig.read(artifact)
    assert saved.stage2 == "merged"
    assert saved.settings == first.settings
    assert saved.base.fingerprint == first.base.fingerprint
    # Where the base model lay is nobody else's concern.
    assert str(tiny_base.parent) not in (tmp_path / "saved" / CONFIG_FILE).read_text()
    assert str(tiny_base.parent) not in (tmp_path / "saved" / "config.json").read_text()


def test_weights_in_several_files_replace_those_of_an_earlier_save(tmp_path):
    first, second = tiny_sparse(), tiny_sparse(seed=1)
    (tmp_path / "notes.txt").write_text("mine")
    first.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    check_same(tmp_path, first)
    second.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("model-*"))
    check_same(tmp_path, second)
    first.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    check_same(tmp_path, first)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_save_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    first, second = tiny_sparse(), tiny_sparse(seed=1)
    first.save_pretrained(tmp_path)
    monkeypatch.setattr(
        "rtpurbo.models.saving.indexer_weights", lambda model: pytest.fail("interrupted")
    )
    with pytest.raises(pytest.fail.Exception, match="interrupted"):
        second.save_pretrained(tmp_path)
    check_same(tmp_path, first)


def test_changed_settings_are_saved(tmp_path):
    model = tiny_sparse()
    model.rtpurbo.set_rule(top_p=0.3)
    for weight in indexer_weights(model):
        assert weight
    model.save_pretrained(tmp_path)
    check_same(tmp_path, model)
    assert ArtifactConfig.read(tmp_path).config.attention.top_p == 0.3


def test_a_restored_model_is_saved_dense(tmp_path):
    model = restore(tiny_sparse())
    model.save_pretrained(tmp_path)
    assert not (tmp_path / CONFIG_FILE).exists()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"


def test_only_the_main_process_writes(tmp_path):
    tiny_sparse().save_pretrained(tmp_path / "saved", is_main_process=False)
    assert not list(tmp_path.glob("saved/*"))


@pytest.mark.parametrize("through", ["push_to_hub", "save_pretrained"])
def test_the_sparse_model_is_pushed(tmp_path, monkeypatch, through):
    model, pushed = tiny_sparse(), tmp_path / "pushed"

    def upload(self, working_dir, repo_id, *args, **kwargs):
        assert repo_id == "somebody/sparse"
        shutil.copytree(working_dir, pushed)

    class Hub:
        def create_repo(self, repo_id, **kwargs):
            return type("Url", (), {"repo_id": repo_id})()

    def no_card(*args, **kwargs):
        raise LocalEntryNotFoundError("the repository has no model card")

    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", no_card)
    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr("transformers.utils.hub.hf_api", Hub, raising=False)
    monkeypatch.setattr("transformers.utils.hub.create_repo", Hub().create_repo, raising=False)
    if through == "push_to_hub":
        model.push_to_hub("somebody/sparse")
    else:
        model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="somebody/sparse")
        check_same(tmp_path / "saved", model)
    check_same(pushed, model)


def test_trainer_trains_saves_and_resumes_a_sparse_model(tmp_path):
    model = tiny_sparse().train()
    for name, weight in model.named_parameters():
        weight.requires_grad_("indexer" not in name)
    data = [{"input_ids": list(range(2, 34)), "labels": list(range(2, 34))}] * 4
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=2, save_steps=1, report_to=[], use_cpu=True, logging_steps=1
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    check_same(tmp_path / "saved", model.eval())
    check_same(tmp_path / "run" / "checkpoint-2", model)

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1").train()
    for name, weight in fresh.named_parameters():
        weight.requires_grad_("indexer" not in name)
    resumed = Trainer(fresh, arguments, train_dataset=data)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    torch.testing.assert_close(logits(fresh.eval()), logits(model))


def test_indexers_are_stored_in_full_precision(tmp_path):
    model = tiny_sparse()
    model.bfloat16().save_pretrained(tmp_path)
    assert {w.dtype for w in load_file(tmp_path / INDEXER_FILE).values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_a_base_without_a_tokenizer_can_be_saved_and_loaded(tmp_path):
    base = save_tiny_base(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base)
    make_sparse(model, sparse_config(model)).save_pretrained(tmp_path / "saved")
    assert is_sparse(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"))
    with pytest.raises(rtpurbo.RTPurboError, match="tokenizer"):
        rtpurbo.load(tmp_path / "saved")

"""Text decoders of multimodal checkpoints: loaded whole, converted, saved, loaded again."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Mistral3ForConditionalGeneration,
)

import rtpurbo
from rtpurbo.config import AttentionRule, IndexerSettings, RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.base import load_base_model, read_config
from rtpurbo.models.sparsify import sparsify
from rtpurbo.models.text import generate_text
from tests.models.zoo.multimodal import TEXT, VISION, WRAPPERS, wrapper_config
from tests.tiny_artifact import save_tiny_artifact
from tests.tiny_models import any_model, head_map_of, make_sparse
from tests.tiny_tokenizer import tiny_tokenizer

FAST = ("gemma3", "mistral3", "internvl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "llama4")


def tiny_wrapper(kind, seed=0):
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(
        wrapper_config(kind), experts_implementation="eager"
    )
    return model.eval().requires_grad_(False)


def save(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def logits(model, ids, mask):
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def batch():
    ids = torch.randint(2, 400, (2, 30), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    return ids, mask


@pytest.mark.parametrize("kind", FAST)
def test_the_text_decoder_equals_the_whole_model_on_text(kind, tmp_path):
    check_equal(kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in WRAPPERS if kind not in FAST])
def test_every_text_decoder_equals_its_whole_model_on_text(kind, tmp_path):
    check_equal(kind, tmp_path)


def check_equal(kind, tmp_path):
    wrapper = tiny_wrapper(kind)
    folder = save(wrapper, tmp_path / "model")
    assert read_config(folder).model_type == wrapper.config.get_text_config().model_type
    base = load_base_model(folder)
    ids, mask = batch()
    # The wrapper of llama4 returns the logits of its causal language model; it fails in transformers 5.24.
    whole = wrapper.language_model if kind == "llama4" else wrapper
    expected = logits(whole, ids, mask)
    torch.testing.assert_close(logits(base.model, ids, mask)[mask.bool()], expected[mask.bool()])
    names = [name for name, _ in base.model.named_parameters()]
    assert not any("vision" in name or "visual" in name for name in names)
    assert base.reference.architecture.endswith("ForCausalLM")
    tied = base.model.get_output_embeddings().weight is base.model.get_input_embeddings().weight
    assert tied == wrapper.config.tie_word_embeddings

    sparse = make_sparse(base.model, seeing_everything(base.model))
    torch.testing.assert_close(
        logits(sparse, ids, mask)[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4
    )
    check_generation(sparse, whole, ids, mask)
    sparse.save_pretrained(tmp_path / "sparse")
    tiny_tokenizer().save_pretrained(tmp_path / "sparse")
    assert any(name.startswith("model.layers.1.") for name in saved_names(tmp_path / "sparse"))
    again, _ = rtpurbo.load(tmp_path / "sparse")
    assert torch.equal(logits(again, ids, mask), logits(sparse, ids, mask))


def saved_names(folder):
    names = set(load_file(folder / "model.safetensors"))
    assert not any("language_model" in name for name in names)
    return names


def seeing_everything(model):
    head_map = head_map_of(model, [1, 4])
    rule = AttentionRule(num_sink_tokens=2, sliding_window=8, top_p=1.0, min_tokens=1, block_size=8)
    return RTPurboConfig(head_map, replace(rule, sliding_window=256), IndexerSettings(4))


def check_generation(model, whole, ids, mask):
    """A sparse model that attends to everything writes what the whole model does; images are refused."""
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **settings), whole.generate(ids, **settings))
    image = torch.zeros(1, 3, 28, 28)
    with pytest.raises(ValueError, match="pixel_values"):
        model.generate(ids, **settings, pixel_values=image)
    with pytest.raises(RTPurboError, match="takes text alone, not pixel_values"):
        model(input_ids=ids, pixel_values=image)


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl"])
def test_an_artifact_of_a_multimodal_checkpoint(kind, tmp_path):
    base = tmp_path / "model"
    save(tiny_wrapper(kind), base)
    artifact = save_tiny_artifact(tmp_path / "artifact", base, stage2="lora")
    model, _ = rtpurbo.load(artifact)
    ids, mask = batch()
    rtpurbo.export(artifact, tmp_path / "export", "transformers")
    exported, tokenizer = rtpurbo.load(tmp_path / "export")
    assert torch.allclose(logits(exported, ids, mask), logits(model, ids, mask), atol=1e-5)
    assert generate_text(exported, tokenizer, "a number", max_new_tokens=4)


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file(change(weights), path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["gemma3", "llama4", "qwen2_5_vl"])
def test_a_checkpoint_that_lacks_a_layer_is_refused(kind, tmp_path):
    folder = tmp_path / "model"
    save(tiny_wrapper(kind), folder)
    edit_weights(
        folder,
        lambda weights: {name: one for name, one in weights.items() if ".layers.2." not in name},
    )
    with pytest.raises(RTPurboError, match=r"lack \d+ weights, such as model\.layers\.2\."):
        load_base_model(str(folder))


def test_names_of_older_checkpoints(tmp_path):
    """Before transformers 5, wrappers held a causal language model."""
    folder = tmp_path / "model"
    wrapper = tiny_wrapper("mistral3")
    save(wrapper, folder)

    def older(weights):
        names = {
            "model.language_model.": "language_model.model.",
            "lm_head.": "language_model.lm_head.",
        }
        renamed = {}
        for name, one in weights.items():
            old = next((old for old in names if name.startswith(old)), "")
            renamed[names.get(old, "") + name.removeprefix(old)] = one
        assert "language_model.lm_head.weight" in renamed
        return renamed

    edit_weights(folder, older)
    ids, mask = batch()
    assert torch.equal(
        logits(load_base_model(str(folder)).model, ids, mask), logits(wrapper, ids, mask)
    )


def test_an_output_embedding_of_its_own_is_not_tied(tmp_path):
    """Wrappers tie by default, whatever their checkpoint holds."""
    folder = tmp_path / "model"
    wrapper = tiny_wrapper("internvl")
    save(wrapper, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["tie_word_embeddings"]
    path.write_text(json.dumps(config))
    model = load_base_model(str(folder)).model
    assert model.config.tie_word_embeddings is False
    ids, mask = batch()
    assert torch.equal(logits(model, ids, mask), logits(wrapper, ids, mask))


def test_a_text_model_that_differs_from_the_whole_one_is_refused(tmp_path, monkeypatch):
    folder = save(tiny_wrapper("mistral3"), tmp_path / "model")
    forward = Mistral3ForConditionalGeneration.forward

    def scaled(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(Mistral3ForConditionalGeneration, "forward", scaled)
    with pytest.raises(RTPurboError, match="its logits differ from those of the whole model"):
        load_base_model(folder)


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_a_multimodal_model_in_memory_is_refused(kind):
    wrapper = tiny_wrapper(kind)
    config = seeing_everything(any_model("llama"))
    with pytest.raises(RTPurboError, match=r"multimodal.*rtpurbo\.convert"):
        sparsify(wrapper, config)


def test_a_bidirectional_prefix_is_refused(tmp_path):
    text = {**TEXT, "model_type": "gemma"}
    vision = {**VISION, "model_type": "siglip_vision_model"}
    AutoConfig.for_model("paligemma", text_config=text, vision_config=vision).save_pretrained(
        tmp_path
    )
    with pytest.raises(RTPurboError, match="its attention is not causal"):
        read_config(str(tmp_path))


def test_no_weights_are_read_before_a_refusal(tmp_path):
    text = {**WRAPPERS["gemma3"][0], "use_bidirectional_attention": True, **TEXT}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=VISION)
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(RTPurboError, match="its attention is not causal"):
        load_base_model(str(tmp_path))


def test_a_multimodal_model_that_does_not_generate_text_is_refused(tmp_path):
    AutoConfig.for_model("clip").save_pretrained(tmp_path)
    with pytest.raises(RTPurboError, match="this clip model cannot be made sparse"):
        read_config(str(tmp_path))


def test_text_classes_can_be_copied_and_pickled(tmp_path):
    folder = save(tiny_wrapper("qwen2_5_vl"), tmp_path / "model")
    model = load_base_model(folder).model
    ids, mask = batch()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, ids, mask), logits(model, ids, mask))
    loss = model(input_ids=ids, labels=ids).loss
    shifted = torch.nn.functional.cross_entropy(
        model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(loss, shifted)

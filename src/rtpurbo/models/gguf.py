"""GGUF files as base models: the configuration, and weights and tokenizer as transformers decodes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from transformers import (
    AddedToken,
    AutoConfig,
    GemmaTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import modeling_gguf_pytorch_utils as gguf_reader
from transformers.convert_slow_tokenizer import generate_merges
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import attention_shapes
from rtpurbo.models.gguf_header import GgufHeader, read_gguf_header
from rtpurbo.models.pretrained import LoadingOptions, load_pretrained
from rtpurbo.models.runtime import attributes_set
from rtpurbo.settings import Progress

SUFFIX = ".gguf"

_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
"""Tokens that end an answer or a text, in whichever model has them."""

_CONTROL, _USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type`."""

# Names that llama.cpp and transformers have for the same architecture; transformers' own loader
# must know how to decode the weights of each.
_MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}

_HYPERPARAMETERS = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_REQUIRED = ("context_length", "block_count", "embedding_length", "attention.head_count")
_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
}
_WITH_HEAD_DIM = ("llama", "qwen3", "qwen3moe", "gemma3")
_GEMMA3_27B_LAYERS = 62

_LLAMA3_TENSOR = "rope_freqs.weight"
_LONGROPE_TENSOR = "rope_factors_long.weight"
# Llama 3.1 to 3.3 all have these; the file only has the factors that come of them.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def find_gguf(path: Path) -> Path | None:
    """Returns the GGUF file at `path`, or in a folder without weights of another format.

    Raises:
        RTPurboError: the folder holds several.
    """
    if path.is_file():
        return path if path.suffix.lower() == SUFFIX else None
    if not path.is_dir():
        return None
    content = sorted(path.iterdir())
    if any(file.suffix in (".safetensors", ".bin") for file in content):
        return None
    files = [file for file in content if file.suffix.lower() == SUFFIX]
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
        raise RTPurboError(
            f"the folder {path} holds {len(files)} GGUF files ({names}); give the path of one."
        )
    return files[0] if files else None


def read_gguf_config(path: Path) -> PretrainedConfig:
    """Reads the configuration of the model in a GGUF file, with the type it is decoded to.

    transformers can read it too, but takes half a minute where a vocabulary is large, and leaves out
    the size of heads and experts for some families.

    Raises:
        RTPurboError: the file is damaged, or its model is not supported.
    """
    return gguf_config(read_gguf_header(path))


def decode_gguf(
    path: Path, progress: Progress, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Decodes a GGUF file on the CPU, in `GgufHeader.decoded_dtype` unless a dtype is given.

    Raises:
        RTPurboError: the file is damaged, or its model is not supported.
    """
    header = read_gguf_header(path)
    config = gguf_config(header)
    # Old versions of transformers have no such option, and always dequantise.
    quantization = getattr(transformers, "GgufConfig", None)
    # Reading the vocabulary comes first, and takes a while.
    progress("decoding", 0, len(header.tensors), {})
    changes: list[tuple[Any, dict[str, Any]]] = [
        # Parses the file once, not for weights and tokenizer each: half a minute where a vocabulary is large.
        (gguf, {"GGUFReader": cache(gguf.GGUFReader)}),
        # transformers has no option for its progress bar.
        (gguf_reader, {"tqdm": _reporting(progress)} if hasattr(gguf_reader, "tqdm") else {}),
    ]
    with attributes_set(changes):
        options = LoadingOptions(
            {"gguf_file": path.name},
            {} if quantization is None else {"quantization_config": quantization(dequantize=True)},
            dtype or header.decoded_dtype(),
        )
        model, decoded = load_pretrained(str(path.parent), options, config=config)
        tokenizer = corrected_tokenizer(decoded, path)
    model.generation_config.eos_token_id = _end_token_ids(header, tokenizer) or None
    return model, tokenizer


def _end_token_ids(header: GgufHeader, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end generation: a GGUF file has one, models have several.

    An instruct model whose file names the end of a text would not stop at the end of its turn.
    """
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    named = [header.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    vocabulary = tokenizer.get_vocab()
    # Only special tokens count; the same characters could be a piece of text elsewhere.
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = [vocabulary[token] for token in _END_TOKENS if vocabulary.get(token) in special]
    return list(dict.fromkeys(int(token) for token in [*named, *known] if token is not None))


def _reporting(progress: Progress) -> Callable[..., Iterable[Any]]:
    """Returns a function in place of `tqdm` that reports each decoded tensor to `progress`."""

    def report(tensors: Sequence[Any], *_: Any, **__: Any) -> Iterable[Any]:
        for done, tensor in enumerate(tensors, start=1):
            yield tensor
            progress("decoding", done, len(tensors), {})

    return report


def corrected_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a GGUF file as a current version of transformers decodes it.

    transformers 5.17 makes a Unigram model of Gemma's vocabulary, which splits text into single characters, and leaves
    out the BOS token. It is a BPE model, whose merges follow from the order of the vocabulary.
    """
    if not isinstance(tokenizer, GemmaTokenizer):
        return tokenizer
    if type(tokenizer.backend_tokenizer.model).__name__ != "Unigram":
        return tokenizer
    fields = gguf.GGUFReader(path).fields
    tokens = [str(token) for token in fields["tokenizer.ggml.tokens"].contents()]
    # Runs of spaces are stored as they are, and Gemma replaces each space before it looks up a token.
    tokens = ["▁" * len(token) if " " in token and not token.strip() else token for token in tokens]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = generate_merges(vocabulary, {token: -number for token, number in vocabulary.items()})
    names = ("unk_token", "bos_token", "eos_token", "pad_token", "mask_token")
    corrected = GemmaTokenizer(
        vocab=vocabulary,
        merges=merges,
        add_bos_token=True,
        **{name: token for name in names if (token := getattr(tokenizer, name))},
    )
    corrected.chat_template = tokenizer.chat_template
    kinds = fields["tokenizer.ggml.token_type"].contents()
    for kind in (_CONTROL, _USER_DEFINED):
        is_special = kind == _CONTROL
        corrected.add_tokens(
            [
                AddedToken(token, normalized=False, special=is_special)
                for token, found in zip(tokens, kinds, strict=True)
                if found == kind
            ],
            special_tokens=is_special,
        )
    return corrected


def gguf_config(header: GgufHeader) -> PretrainedConfig:
    """Returns the configuration of the model, with the type that it is decoded to.

    Raises:
        RTPurboError: the file's architecture is not supported, or hyperparameters are missing.
    """
    architecture = header.metadata["general.architecture"]
    if architecture not in _MODEL_TYPES:
        raise RTPurboError(
            f"GGUF files of the architecture '{architecture}' are not supported ({header.path}); "
            f"supported are: {', '.join(sorted(_MODEL_TYPES))}."
        )
    missing = [key for key in _REQUIRED if header.hyperparameter(key) is None]
    if missing or "token_embd.weight" not in header.tensors:
        lacking = missing[0] if missing else "token_embd.weight"
        raise RTPurboError(f"{header.path} lacks {lacking}; download it again.")

    values: dict[str, Any] = {
        ours: value
        for theirs, ours in _HYPERPARAMETERS.items()
        if (value := header.hyperparameter(theirs)) is not None
    }
    for theirs, ours in _TOKENS.items():
        # None where the file has none: a family's defaults are tokens of another vocabulary.
        values[ours] = header.metadata.get(f"tokenizer.ggml.{theirs}")
    # Padded vocabularies have more rows than tokens.
    values["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    # llama.cpp writes an output layer only where it is not the embedding.
    values["tie_word_embeddings"] = "output.weight" not in header.tensors
    values["dtype"] = header.decoded_dtype()
    values |= _family_values(architecture, header)
    config = AutoConfig.for_model(_MODEL_TYPES[architecture], **values)
    set_rope_scaling(config, header)
    return config


def _family_values(architecture: str, header: GgufHeader) -> dict[str, Any]:
    """Parts that only some families have."""
    values: dict[str, Any] = {}
    queries = header.tensors.get("blk.0.attn_q.weight")
    if queries is not None and architecture in _WITH_HEAD_DIM:
        # Old files have no entry for it.
        values["head_dim"] = queries.shape[0] // header.hyperparameter("attention.head_count")
    if architecture == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
    if architecture == "qwen3moe":
        values["norm_topk_prob"] = True
    if architecture == "gemma3":
        values["sliding_window"] = header.hyperparameter("attention.sliding_window")
        if header.hyperparameter("block_count") == _GEMMA3_27B_LAYERS:
            # The one size whose queries are not scaled by the size of a head.
            width = header.hyperparameter("embedding_length")
            values["query_pre_attn_scalar"] = width // header.hyperparameter("attention.head_count")
    return values


def set_rope_scaling(config: PretrainedConfig, header: GgufHeader) -> None:
    """Sets the `rope_parameters` of a configuration to the scaling that the file describes.

    transformers does not read it: a model with a scaled context would lose the thread in long texts.

    Raises:
        RTPurboError: the file scales its frequencies in a way that is not supported.
    """
    dimensions = header.hyperparameter("rope.dimension_count")
    head_dim = next(iter(attention_shapes(config).values())).head_dim
    if dimensions not in (None, head_dim):
        raise _unsupported(header, f"{dimensions} of {head_dim} dimensions")
    kind = header.hyperparameter("rope.scaling.type")
    factor = header.hyperparameter("rope.scaling.factor")
    if _LLAMA3_TENSOR in header.tensors:
        _set_llama3(config, header)
    elif kind == "longrope" or _LONGROPE_TENSOR in header.tensors:
        raise _unsupported(header, "longrope")
    elif kind in ("linear", "yarn") and factor:
        scaling = {"rope_type": kind, "factor": float(factor)}
        original = header.hyperparameter("rope.scaling.original_context_length")
        if kind == "yarn" and original:
            scaling["original_max_position_embeddings"] = int(original)
        # Gemma 3 scales only the layers with full attention.
        scaled = config.rope_parameters.get("full_attention", config.rope_parameters)
        scaled.update(scaling)
    elif kind not in (None, "none", "linear"):
        raise _unsupported(header, kind)


def _set_llama3(config: PretrainedConfig, header: GgufHeader) -> None:
    """Sets the scaling of Llama 3 after checking that it gives the factors in the file."""
    factors = torch.from_numpy(header.read_float32(_LLAMA3_TENSOR))
    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        **_LLAMA3,
    }
    dimensions = 2 * len(factors)
    unscaled = theta ** -(torch.arange(0, dimensions, 2) / dimensions)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if scaled.shape != unscaled.shape or not torch.allclose(scaled, unscaled / factors, rtol=1e-3):
        raise _unsupported(header, "frequencies other than those of Llama 3")


def _unsupported(header: GgufHeader, kind: object) -> RTPurboError:
    return RTPurboError(
        f"the rotary embedding of {header.path} ({kind}) is not supported for GGUF files; use the "
        "model's safetensors files."
    )

"""Configuration of the model in a GGUF file, with its rotary frequencies.

transformers can read it too, but takes half a minute where a vocabulary is large, and leaves out
the size of heads and experts for some families.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import attention_shapes
from rtpurbo.models.gguf_header import GgufHeader

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

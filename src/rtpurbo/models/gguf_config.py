"""Configuration of the model in a GGUF file.

transformers can read it too, but takes half a minute where a vocabulary is large, and leaves out
the size of heads and experts for some families.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from rtpurbo.errors import RTPurboError
from rtpurbo.models.gguf_header import GgufHeader
from rtpurbo.models.gguf_rope import set_rope_scaling

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
        # Old files do not tell it otherwise.
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

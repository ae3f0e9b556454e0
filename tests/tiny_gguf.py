"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    TokenType,
    get_tensor_name_map,
    quantize,
)
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny_tokenizer import tiny_tokenizer

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
KINDS = {kind.name: kind for kind in GGMLQuantizationType}


def tiny_model(model_type: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model whose matrices are whole blocks of Q8_0."""
    torch.manual_seed(seed)
    values = {
        "vocab_size": len(tiny_tokenizer()),
        "hidden_size": 96,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 32 if model_type in ("qwen3", "qwen3_moe", "gemma3_text") else 16,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "tie_word_embeddings": model_type == "gemma3_text",
        "eos_token_id": 0,
    }
    if model_type == "gemma3_text":
        # Every sixth layer has full attention, in files too.
        values |= {"num_hidden_layers": 6, "sliding_window": 8}
    if model_type == "qwen3_moe":
        values |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        values |= {"norm_topk_prob": True}
    if model_type == "phi3":
        values |= {"pad_token_id": None, "original_max_position_embeddings": 256}
    config = AutoConfig.for_model(model_type, **values | changes)
    return AutoModelForCausalLM.from_config(config).eval()


def write_tiny_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: str = "F32",
    *,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    architecture: str | None = None,
) -> Path:
    """Writes a model with the tiny tokenizer.

    Args:
        path: the file.
        model: from `tiny_model`.
        kind: how matrices are stored; the rest is float32.
        metadata: more of it, after the architecture's name and a dot where it begins with a dot.
        tensors: more of them, as float32.
        architecture: what the file says instead of the model's.
    """
    config = model.config
    known = ARCHITECTURES[config.model_type]
    writer = GGUFWriter(path, architecture or known)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if known == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if known in ("qwen3", "qwen3moe", "gemma3"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if known == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if known == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for key, value in (metadata or {}).items():
        key = known + key if key.startswith(".") else key
        (writer.add_string if isinstance(value, str) else _adder(writer, value))(key, value)
    _add_tokenizer(writer)

    names = get_tensor_name_map(
        next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == known),
        config.num_hidden_layers,
    )
    for name, weights in _split_experts(model.state_dict()).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = _as_llama_cpp_has_it(name, weights.float().numpy(), config, known)
        matrix = KINDS[kind] if values.ndim > 1 else GGMLQuantizationType.F32
        suffix = ".bias" if name.endswith(".bias") else ".weight"
        stored = names.get_name(name.removesuffix(suffix)) + suffix
        writer.add_tensor(stored, quantize(values, matrix), None, matrix)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _split_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gate and up projections of experts apart, as files have them."""
    split = {}
    for name, tensor in weights.items():
        if name.endswith("experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            split[stem + "gate_proj"], split[stem + "up_proj"] = tensor.chunk(2, dim=1)
        else:
            split[name] = tensor
    return split


def _adder(writer: GGUFWriter, value: float) -> Any:
    return writer.add_uint32 if isinstance(value, int) else writer.add_float32


def _as_llama_cpp_has_it(name: str, values: np.ndarray, config: Any, known: str) -> np.ndarray:
    if known == "gemma3" and "norm" in name:
        return values + 1
    heads = {
        "q_proj": config.num_attention_heads,
        "k_proj": config.num_key_value_heads,
    }.get(name.split(".")[-2])
    if known != "llama" or heads is None:
        return values
    # Rotary pairs side by side, not half a head apart.
    shape = (heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return np.ascontiguousarray(values.reshape(shape).swapaxes(1, 2).reshape(values.shape))


def _add_tokenizer(writer: GGUFWriter) -> None:
    tokenizer = tiny_tokenizer()
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    special = set(tokenizer.added_tokens_decoder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types(
        [TokenType.CONTROL if number in special else TokenType.NORMAL for _, number in tokens]
    )
    writer.add_token_scores([-float(number) for _, number in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    # As in files that name the end of a text, and not of an answer.
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    writer.add_eos_token_id(end)
    writer.add_bos_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)

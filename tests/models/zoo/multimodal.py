"""Tiny configurations of multimodal model types, whose text decoders become sparse models."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from tests.models.zoo.configurations import DELTA

TEXT = {
    "vocab_size": 512,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 48,
    "patch_size": 14,
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
IMAGE_TOKENS = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502}

# Model type, what differs in its text part, its vision part, and the rest.
WRAPPERS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma3": (
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 8,
            "query_pre_attn_scalar": 8,
        },
        VISION,
        {"mm_tokens_per_image": 4, "image_token_index": 500},
    ),
    "mistral3": (
        {"model_type": "mistral", "sliding_window": None},
        {**VISION, "model_type": "pixtral"},
        {"image_token_index": 500, "tie_word_embeddings": False},
    ),
    "internvl": (
        {"model_type": "qwen2"},
        {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        {"image_token_id": 500, "tie_word_embeddings": False},
    ),
    "qwen2_5_vl": (
        {"rope_parameters": MROPE},
        QWEN_VISION,
        {**IMAGE_TOKENS, "tie_word_embeddings": True},
    ),
    "qwen3_vl": (
        {"rope_parameters": {**MROPE, "mrope_interleaved": True}},
        {**QWEN_VISION, "deepstack_visual_indexes": [0]},
        IMAGE_TOKENS,
    ),
    "qwen3_5": (
        {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "rope_parameters": {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
            **DELTA,
        },
        QWEN_VISION,
        {**IMAGE_TOKENS, "tie_word_embeddings": True},
    ),
    "llama4": (
        {
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 1, 1, 0],
            "attention_chunk_size": 16,
        },
        {**VISION, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        {"image_token_index": 500},
    ),
    "llava": (
        {"model_type": "llama"},
        {**VISION, "model_type": "clip_vision_model"},
        {"image_token_index": 500, "tie_word_embeddings": False},
    ),
    "qwen2_vl": (
        {"rope_parameters": MROPE},
        {"depth": 1, "embed_dim": 32, "hidden_size": 48, "num_heads": 2},
        IMAGE_TOKENS,
    ),
    "qwen3_vl_moe": (
        {
            "rope_parameters": {**MROPE, "mrope_interleaved": True},
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
        {**QWEN_VISION, "deepstack_visual_indexes": [0]},
        IMAGE_TOKENS,
    ),
    "glm4v": (
        {"rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
        {**QWEN_VISION, "image_size": 28},
        IMAGE_TOKENS,
    ),
    "glm4v_moe": (
        {
            "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0},
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
        },
        {**QWEN_VISION, "image_size": 28},
        IMAGE_TOKENS,
    ),
    "gemma4": (
        {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 8,
            "num_kv_shared_layers": 0,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 0,
            "pad_token_id": 0,
        },
        VISION,
        {},
    ),
    "idefics3": ({"model_type": "llama"}, VISION, {"image_token_id": 500}),
    "smolvlm": ({"model_type": "llama"}, VISION, {"image_token_id": 500}),
    "llava_next": (
        {"model_type": "mistral", "sliding_window": None},
        {**VISION, "model_type": "clip_vision_model"},
        {"image_token_index": 500, "tie_word_embeddings": False},
    ),
    "lfm2_vl": (
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2},
        {**VISION, "model_type": "siglip2_vision_model"},
        {"image_token_id": 500},
    ),
}


def wrapper_config(kind: str) -> PretrainedConfig:
    """The composite configuration of a model type in `WRAPPERS`."""
    text, vision, rest = WRAPPERS[kind]
    text = {**TEXT, **text}
    return AutoConfig.for_model(kind, text_config=text, vision_config=vision, **rest)

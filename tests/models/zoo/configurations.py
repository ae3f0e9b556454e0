"""Tiny configurations of decoder types of transformers: name, model type, and what differs from `COMMON`.

`EQUAL` become sparse models that equal their dense selves where they see everything; `REFUSED` say why not.
"""

from __future__ import annotations

from typing import Any

from tests.tiny_models import DROPPED

Zoo = dict[str, tuple[str, dict[str, Any]]]

ALTERNATING = ["sliding_attention", "full_attention"] * 2
LINEAR = ["linear_attention", "full_attention"] * 2


def rope(kind: str = "default", **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **parameters}}


def layers(types: list[str], **changes: Any) -> dict[str, Any]:
    return {"num_hidden_layers": len(types), "layer_types": types, **changes}


WINDOWS = layers(ALTERNATING, sliding_window=8)
GEMMA = {**WINDOWS, "query_pre_attn_scalar": 8}
HALF_ROTATED = rope(partial_rotary_factor=0.5)
MROPE = rope(partial_rotary_factor=1.0, mrope_section=[2, 1, 1], mrope_interleaved=True)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
LONGROPE = {
    **rope(
        "longrope",
        partial_rotary_factor=1.0,
        short_factor=[1.0] * 4,
        long_factor=[1.0, 2.0, 4.0, 8.0],
        original_max_position_embeddings=32,
    ),
    "original_max_position_embeddings": 32,
}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
}
FIRST_DENSE = {"first_k_dense_replace": 1}
GROUPS = {"n_group": 1, "topk_group": 1}
LATENT = {
    "num_key_value_heads": 6,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
MAMBA = {
    "mamba_n_heads": 12,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}
GRANITE = {
    "attention_multiplier": 0.2,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "logits_scaling": 4.0,
}
GEMMA4 = {
    **WINDOWS,
    "num_kv_shared_layers": 0,
    "global_head_dim": 16,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 0,
}

EQUAL: Zoo = {
    "Llama 3.1": ("llama", LLAMA3),
    "Llama, one KV head": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "Llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Qwen2.5 with YaRN": ("qwen2", YARN),
    "Qwen2 with windows": (
        "qwen2",
        {
            "num_hidden_layers": 4,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 2,
        },
    ),
    "Qwen2-MoE": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", EXPERTS),
    "Qwen3-Next": (
        "qwen3_next",
        {
            **layers(LINEAR),
            **EXPERTS,
            **DELTA,
            **HALF_ROTATED,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "Qwen3.5": ("qwen3_5_text", {**layers(LINEAR), **DELTA, **MROPE}),
    "Qwen3.5-MoE": (
        "qwen3_5_moe_text",
        {**layers(LINEAR), **EXPERTS, **DELTA, **MROPE, "shared_expert_intermediate_size": 16},
    ),
    "Mistral": ("mistral", {"sliding_window": None}),
    "Ministral": ("ministral", WINDOWS),
    "Ministral 3": (
        "ministral3",
        {
            "sliding_window": None,
            **rope(
                "yarn",
                factor=16.0,
                original_max_position_embeddings=16,
                llama_4_scaling_beta=0.1,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        },
    ),
    "Mixtral": ("mixtral", {**LOCAL_EXPERTS, "sliding_window": None}),
    "Llama 4": (
        "llama4_text",
        {
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 1, 1, 0],
            "attention_chunk_size": 16,
        },
    ),
    "Gemma": ("gemma", {}),
    "Gemma 2 without caps": ("gemma2", {**GEMMA, "attn_logit_softcapping": None}),
    "Gemma 3": ("gemma3_text", GEMMA),
    "Gemma 3n": (
        "gemma3n_text",
        {
            **WINDOWS,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": None,
        },
    ),
    "Gemma 4": ("gemma4_text", GEMMA4),
    "Gemma 4, keys as values": (
        "gemma4_text",
        {**GEMMA4, "num_global_key_value_heads": 2, "attention_k_eq_v": True},
    ),
    "Gemma 4 unified": ("gemma4_unified_text", GEMMA4),
    "gpt-oss": (
        "gpt_oss",
        {
            **WINDOWS,
            **LOCAL_EXPERTS,
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                beta_fast=32.0,
                beta_slow=1.0,
                truncate=False,
            ),
        },
    ),
    "GLM-4": ("glm", HALF_ROTATED),
    "GLM-4-0414": ("glm4", {**HALF_ROTATED, "attention_bias": True}),
    "GLM-4.5": (
        "glm4_moe",
        {**ROUTED, **FIRST_DENSE, **HALF_ROTATED, "use_qk_norm": True, "attention_bias": True},
    ),
    "GLM-4.5-Air": (
        "glm4_moe",
        {**ROUTED, **FIRST_DENSE, **HALF_ROTATED, "use_qk_norm": False, "attention_bias": True},
    ),
    "Phi-2": ("phi", HALF_ROTATED),
    "Phi-3": ("phi3", {**HALF_ROTATED, "original_max_position_embeddings": 256}),
    "Phi-3 with longrope": ("phi3", LONGROPE),
    "Phi-4-mini": (
        "phi3",
        {
            **rope(
                "longrope",
                partial_rotary_factor=0.75,
                short_factor=[1.0] * 3,
                long_factor=[1.0, 2.0, 4.0],
                original_max_position_embeddings=32,
            ),
            "original_max_position_embeddings": 32,
        },
    ),
    "Phi-3.5-MoE": ("phimoe", {**LOCAL_EXPERTS, "sliding_window": None}),
    "Granite 3": ("granite", GRANITE),
    "Granite 3 MoE": ("granitemoe", {**GRANITE, **LOCAL_EXPERTS}),
    "Granite MoE, shared": (
        "granitemoeshared",
        {**LOCAL_EXPERTS, "attention_multiplier": 0.3, "shared_intermediate_size": 16},
    ),
    "Granite with windows": ("granite_swa", {**WINDOWS, "attention_multiplier": 0.3}),
    "Granite MoE with windows": (
        "granitemoe_swa",
        {**WINDOWS, **LOCAL_EXPERTS, "attention_multiplier": 0.3},
    ),
    "Granite 4-H": (
        "granitemoehybrid",
        {
            **layers(LINEAR),
            **LOCAL_EXPERTS,
            **MAMBA,
            "attention_multiplier": 0.3,
            "shared_intermediate_size": 16,
            "position_embedding_type": None,
        },
    ),
    "Granite 4, dense": (
        "granitemoehybrid",
        {
            **layers(["full_attention"] * 2),
            **MAMBA,
            "attention_multiplier": 0.3,
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 16,
            "position_embedding_type": "rope",
        },
    ),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", WINDOWS),
    "OLMoE": ("olmoe", EXPERTS),
    "FlexOlmo": ("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    "OLMo-hybrid": (
        "olmo_hybrid",
        {
            **layers(LINEAR),
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "StarCoder2": ("starcoder2", {"sliding_window": None}),
    "Command-R": ("cohere", {}),
    "Command-R+": ("cohere", {"use_qk_norm": True}),
    "Command-A": ("cohere2", WINDOWS),
    "Cohere2-MoE": ("cohere2_moe", {**WINDOWS, **EXPERTS}),
    "Cohere Compass": (
        "cohere_compass_text",
        {
            **WINDOWS,
            "rope_parameters": {
                "full_attention": None,
                "sliding_attention": {**MROPE["rope_parameters"], "mrope_interleaved": True},
            },
        },
    ),
    "SmolLM3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "Ernie 4.5": ("ernie4_5", {}),
    "Ernie 4.5 MoE": (
        "ernie4_5_moe",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 16,
            "moe_num_shared_experts": 1,
        },
    ),
    "Seed-OSS": ("seed_oss", {"attention_bias": True, "attention_out_bias": False}),
    "HunYuan": ("hunyuan_v1_dense", {}),
    "HunYuan MoE": ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}),
    "Hy3": ("hy_v3", EXPERTS),
    "EXAONE 3.5": ("exaone", {}),
    "EXAONE 4, full": (
        "exaone4",
        {**layers(["full_attention"] * 2), "sliding_window": None},
    ),
    "EXAONE 4": ("exaone4", {**WINDOWS, "sliding_window_pattern": "LG"}),
    "K-EXAONE": ("exaone_moe", {**WINDOWS, **EXPERTS, "sliding_window_pattern": "LG"}),
    "MiniMax M2": ("minimax_m2", {**LOCAL_EXPERTS, **HALF_ROTATED}),
    "Falcon-H1": ("falcon_h1", {**MAMBA, "mamba_d_ssm": 96, "key_multiplier": 0.5}),
    "LFM2": ("lfm2", layers(["conv", "full_attention"] * 2)),
    "LFM2-MoE": (
        "lfm2_moe",
        {**layers(["conv", "full_attention"] * 2), **EXPERTS, "num_dense_layers": 1},
    ),
    "LFM3": ("lfm3", {"num_hidden_layers": 4}),
    "Apertus": ("apertus", {}),
    "Apertus 1.5": ("apertus1p5_text", {}),
    "Nemotron": ("nemotron", HALF_ROTATED),
    "Nemotron-H": (
        "nemotron_h",
        {
            "layers_block_type": [
                *("linear_attention", "full_attention", "mlp"),
                *("linear_attention", "full_attention", "moe"),
            ],
            "mamba_num_heads": 12,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
    ),
    "Jamba": (
        "jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "Bamba": ("bamba", {**MAMBA, "num_hidden_layers": 4, "attn_layer_indices": [1, 3]}),
    "MiMo-V2-Flash": ("mimo_v2_flash", WINDOWS),
    "Arcee": ("arcee", {}),
    "Trinity": ("afmoe", {**WINDOWS, **EXPERTS, "num_dense_layers": 1}),
    "Dots1": ("dots1", {**ROUTED, **FIRST_DENSE, **GROUPS}),
    "Helium": ("helium", {}),
    "NanoChat": ("nanochat", {}),
    "StableLM": ("stablelm", HALF_ROTATED),
    "Pythia": ("gpt_neox", {"num_key_value_heads": DROPPED}),
    "CWM": ("cwm", {**WINDOWS, **LLAMA3}),
    "Solar-open": ("solar_open", ROUTED),
    "HyperCLOVAX": ("hyperclovax", {}),
    "Laguna": ("laguna", WINDOWS),
    "Laguna, heads by layer": (
        "laguna",
        {**WINDOWS, "num_attention_heads_per_layer": [6, 3, 6, 12]},
    ),
    "Gemma 4, heads by layer": (
        "gemma4_text",
        {
            **GEMMA4,
            "sliding_window": 256,
            "num_global_key_value_heads": 2,
            "attention_k_eq_v": True,
        },
    ),
    "Mellum": ("mellum", WINDOWS),
    "BitNet": ("bitnet", {}),
    "Aria": ("aria_text", {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}),
    "Beam": ("beam", {"num_hidden_layers": 4}),
    "Flint": ("flint", {**WINDOWS, **EXPERTS}),
    "InternLM3": ("internlm3", {}),
    "IQuestCoder": ("iquestcoder", {}),
    "Jais 2": ("jais2", {}),
    "Kolibri 1": ("kolibri1", WINDOWS),
    "Sarvam MoE": ("sarvam_moe", {**ROUTED, **FIRST_DENSE, **HALF_ROTATED}),
    "Persimmon": ("persimmon", {"num_key_value_heads": 6}),
    "ModernBERT decoder": (
        "modernbert-decoder",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": DROPPED,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "cls_token_id": 1,
            "sep_token_id": 1,
        },
    ),
    "DBRX": (
        "dbrx",
        {
            "d_model": 48,
            "n_heads": 6,
            "n_layers": 2,
            "max_seq_len": 256,
            "attn_config": {"kv_n_heads": 3, "clip_qkv": 1.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "GPT-J": (
        "gptj",
        {
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 6,
            "n_positions": 256,
            "rotary_dim": 4,
            "num_key_value_heads": DROPPED,
        },
    ),
    "Phi-4-multimodal": ("phi4_multimodal", HALF_ROTATED),
    "OPT": (
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 48, "num_key_value_heads": DROPPED},
    ),
    "GPT-2": (
        "gpt2",
        {
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 6,
            "n_positions": 256,
            "num_key_value_heads": DROPPED,
        },
    ),
    "GPT-BigCode": (
        "gpt_bigcode",
        {
            "n_embd": 48,
            "n_layer": 2,
            "n_head": 6,
            "n_positions": 256,
            "num_key_value_heads": DROPPED,
        },
    ),
    "BioGPT": ("biogpt", {"num_key_value_heads": DROPPED}),
    "CodeGen": (
        "codegen",
        {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4},
    ),
    "BERT decoder": ("bert", {"is_decoder": True, "num_key_value_heads": DROPPED}),
    "CTRL": ("ctrl", {"num_key_value_heads": DROPPED, "dff": 48}),
    "GPT-SW3": ("gpt-sw3", {"num_key_value_heads": DROPPED}),
    "LaraMini": ("lara_mini", {"num_hidden_layers": 4}),
    "Zaya": ("zaya", {"num_hidden_layers": 4}),
    "Zamba": (
        "zamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_dt_rank": 4,
        },
    ),
    "Zamba2": (
        "zamba2",
        {
            **{"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
            "num_mem_blocks": 1,
            "mamba_d_state": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 12,
            "chunk_size": 16,
        },
    ),
}

# Numbers of heads differ between the layers that are converted; with Gemma 4 also their size.
HEADS_BY_LAYER = ("Gemma 4, heads by layer", "Laguna, heads by layer")

REFUSED: Zoo = {
    "Qwen4-exp": (
        "qwen4_exp_text",
        {
            **layers(LINEAR),
            **DELTA,
            **MROPE,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
        },
    ),
    "Gemma 2": ("gemma2", GEMMA),
    "Gemma 3, bidirectional": ("gemma3_text", {**GEMMA, "use_bidirectional_attention": True}),
    "Gemma 4, shared keys": (
        "gemma4_text",
        {**GEMMA4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8},
    ),
    "VaultGemma": ("vaultgemma", GEMMA),
    "GLM-4.7-Flash": ("glm4_moe_lite", {**ROUTED, **FIRST_DENSE, **LATENT}),
    "GLM-5": (
        "glm_moe_dsa",
        {**ROUTED, **LATENT, "index_topk": 16, "index_n_heads": 2, "index_head_dim": 16},
    ),
    "DeepSeek V2": ("deepseek_v2", {**ROUTED, **FIRST_DENSE, **GROUPS, **LATENT}),
    "DeepSeek V3": ("deepseek_v3", {**ROUTED, **FIRST_DENSE, **GROUPS, **LATENT}),
    "DeepSeek V4": ("deepseek_v4", {}),
    "Kimi-Linear": (
        "kimi_linear",
        {
            **layers(LINEAR),
            **LATENT,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "moe_intermediate_size": 16,
            "linear_num_heads": 2,
            "linear_head_dim": 8,
            "q_lora_rank": None,
        },
    ),
    "MiniMax M3": ("minimax_m3_vl_text", LOCAL_EXPERTS),
    "Sarvam MLA": ("sarvam_mla", {**ROUTED, **FIRST_DENSE, **GROUPS, **LATENT}),
    "Youtu": ("youtu", LATENT),
    "RecurrentGemma": ("recurrent_gemma", {"num_hidden_layers": 4}),
    "DiffLlama": ("diffllama", {"num_key_value_heads": 6}),
    "HRM": ("hrm_text", {"num_key_value_heads": 6}),
    "JetMoE": ("jetmoe", {**LOCAL_EXPERTS, "kv_channels": 8}),
    "Inkling": ("inkling_text", {"num_hidden_layers": 4}),
    "Falcon": ("falcon", {"alibi": False, "head_dim": DROPPED}),
    "MiniMax-Text-01": ("minimax", {**layers(LINEAR), **LOCAL_EXPERTS, "block_size": 16}),
    "Dory": ("dory", WINDOWS),
    "Doge": ("doge", {"keep_window_size": 16}),
    "MPT": ("mpt", {"d_model": 48, "n_heads": 6, "n_layers": 2, "max_seq_len": 256}),
    "BLOOM": ("bloom", {"n_layer": 2, "n_head": 6}),
    "GPT-Neo": ("gpt_neo", {"num_layers": 2, "attention_types": [[["global"], 2]], "num_heads": 6}),
    "XGLM": ("xglm", {"d_model": 48, "ffn_dim": 48, "num_layers": 2, "attention_heads": 6}),
    "MiniCPM3": ("minicpm3", LATENT),
    "DeepSeek V3.2": ("deepseek_v32", {**ROUTED, **FIRST_DENSE, **GROUPS, **LATENT}),
    "LongCat-Flash": ("longcat_flash", {**LATENT, "num_layers": 2}),
    "Falcon-Mamba": ("falcon_mamba", {}),
    "Gemma 4, keys of the last layers shared": (
        "gemma4_text",
        {
            **GEMMA4,
            **layers(["sliding_attention", "full_attention"] * 3),
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
        },
    ),
}

"""Models of published shapes with random weights, and random head maps and indexers for them."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rtpurbo.benchmarks.layer import dtype_name
from rtpurbo.config import AttentionRule, HeadMap
from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import attention_shapes
from rtpurbo.models.sparse_layers import headwise_modules

CONTEXT = 2**20

_QWEN3 = {"vocab_size": 151936, "head_dim": 128, "rope_theta": 1e6, "tie_word_embeddings": False}
_EXPERTS = {
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}
_SMOLLM2 = {"vocab_size": 49152, "head_dim": 64, "rope_theta": 1e5, "tie_word_embeddings": True}


def _sizes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int
) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-8b": ("qwen3", _QWEN3 | _sizes(4096, 12288, 36, 32, 8)),
    "qwen3-14b": ("qwen3", _QWEN3 | _sizes(5120, 17408, 40, 40, 8)),
    "qwen3-30b-a3b": ("qwen3_moe", _QWEN3 | _EXPERTS | _sizes(2048, 6144, 48, 32, 4)),
    "smollm2-135m": ("llama", _SMOLLM2 | _sizes(576, 1536, 30, 9, 3)),
}
"""Model type in transformers and published sizes, by name."""


def build_model(
    geometry: str,
    layers: int | None,
    dtype: torch.dtype,
    device: torch.device,
    context: int = CONTEXT,
) -> PreTrainedModel:
    """Builds a dense model of a geometry with random weights, in evaluation mode; with all layers if `layers` is None.

    Raises:
        RTPurboError: the geometry is unknown.
    """
    if geometry not in GEOMETRIES:
        raise RTPurboError(
            f"there is no geometry '{geometry}'; choose one of: {', '.join(GEOMETRIES)}."
        )
    family, sizes = GEOMETRIES[geometry]
    if layers is not None:
        sizes = sizes | {"num_hidden_layers": min(layers, sizes["num_hidden_layers"])}
    config = CONFIG_MAPPING[family](**sizes, max_position_embeddings=context)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.to(device).eval().requires_grad_(False)


def spread_head_map(config: Any, ratio: float, seed: int = 0) -> HeadMap:
    """Random head map with about the same share of retrieval heads in every layer."""
    generator = random.Random(seed)
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    totals = [round(ratio * heads * layer) for layer in range(layers + 1)]
    chosen = tuple(
        tuple(sorted(generator.sample(range(heads), totals[layer + 1] - totals[layer])))
        for layer in range(layers)
    )
    return HeadMap(chosen, heads, config.num_key_value_heads)


def draw_indexers(model: PreTrainedModel) -> None:
    """Initialises the indexers of a sparse model with random weights, so that scores differ between keys."""
    for module in headwise_modules(model):
        if not module.retrieval_heads:
            continue
        for weight in module.indexer.parameters():
            generator = torch.Generator(weight.device).manual_seed(0)
            weight.data.normal_(0.0, weight.shape[-1] ** -0.5, generator=generator)


def model_facts(
    phase: str,
    name: str,
    model: PreTrainedModel,
    head_map: HeadMap,
    rule: AttentionRule,
    length: int,
    **others: Any,
) -> dict[str, Any]:
    """Record fields that are known before the measurement, with `others` in addition."""
    return {
        "phase": phase,
        "context_length": length,
        "batch_size": 1,
        **vars(attention_shapes(model.config)[0]),
        "num_retrieval_heads": head_map.num_retrieval_heads,
        "sliding_window": rule.sliding_window,
        "density": 1.0,
        "dtype": dtype_name(model.dtype),
        "model": f"{name}, {model.config.num_hidden_layers} layers",
        **others,
    }

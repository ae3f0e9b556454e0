"""Tiny seeded models of every family, made from their configurations, and helpers to run them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rtpurbo.config import AttentionRule, HeadMap, IndexerSettings, RTPurboConfig
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import empty_head_map, restore, sparsify

VOCABULARY = 64
HEADS, KEY_VALUE_HEADS = 6, 3
# Both kinds of KV heads, and a local head beside each retrieval head.
RETRIEVAL_HEADS = (1, 4)

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "head_dim": 8,
    "max_position_embeddings": 256,
    # Larger than usual, so that attention of random weights has peaks.
    "initializer_range": 0.4,
    "tie_word_embeddings": False,
    # A padding token would have a zero embedding, and a query of zeros gives nothing but ties.
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mistral": {"sliding_window": None},
    "smollm3": {"no_rope_layers": [1, 0]},
    "phi3": {"partial_rotary_factor": 0.5, "original_max_position_embeddings": 256},
    "olmo2": {},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
    },
}

# A field of `COMMON` that a configuration does not take.
DROPPED = object()

PADDING = (5, 0, 11)
LENGTH = 44


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A frozen fp32 model of the family in evaluation mode, the same at every call."""
    config = CONFIG_MAPPING[family](**{**COMMON, **FAMILIES[family], **changes})
    torch.manual_seed(seed)
    # The eager experts also run in fp64.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return model.eval().requires_grad_(False)


def any_model(model_type: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A frozen fp32 model of any type, whose norms, biases and sinks are no neutral values."""
    values = {name: value for name, value in (COMMON | changes).items() if value is not DROPPED}
    config = CONFIG_MAPPING[model_type](**values)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    generator = torch.Generator().manual_seed(seed + 7)
    for name, parameter in model.named_parameters():
        if parameter.ndim <= 2 and any(part in name for part in ("norm", "bias", "sink")):
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval().requires_grad_(False)


def head_map_of(model: PreTrainedModel, heads: Sequence[int]) -> HeadMap:
    """A map with these retrieval heads, as far as a layer has them, in every convertible layer."""
    empty = empty_head_map(model)
    return replace(
        empty,
        retrieval_heads=tuple(
            None if own is None else tuple(h for h in sorted(heads) if h < empty.num_query_heads(n))
            for n, own in enumerate(empty.retrieval_heads)
        ),
    )


def sparse_config(
    model: PreTrainedModel,
    heads: Sequence[int] = RETRIEVAL_HEADS,
    index_space: str = "low_frequency",
    shared_keys: bool = False,
    **rule: Any,
) -> RTPurboConfig:
    """These retrieval heads in every convertible layer; a small window unless told otherwise."""
    head_map = head_map_of(model, heads)
    rule = {"num_sink_tokens": 2, "sliding_window": 8, "min_tokens": 1, "block_size": 8} | rule
    indexer = IndexerSettings(4, index_space, shared_keys=shared_keys)
    return RTPurboConfig(head_map, AttentionRule(**rule), indexer)


def make_sparse(model: PreTrainedModel, config: RTPurboConfig, seed: int = 1) -> PreTrainedModel:
    """Sparsifies in place with random indexers."""
    sparsify(model, config)
    generator = torch.Generator().manual_seed(seed)
    for module in headwise_modules(model):
        if module.retrieval_heads:
            for parameter in module.indexer.parameters():
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def sparse_model(
    family: str = "llama",
    heads: Sequence[int] = RETRIEVAL_HEADS,
    dtype: torch.dtype = torch.float64,
    **rule: Any,
) -> PreTrainedModel:
    """A tiny sparse model whose rows select for themselves, so that its cache can be recomputed.

    In fp32, rounding moves a key across the edge of a selection once in a few thousand rows.
    """
    model = tiny_model(family).to(dtype)
    rule = {"prefill_mode": "top_p", "top_p": 0.6} | rule
    return make_sparse(model, sparse_config(model, heads, **rule))


def with_own_keys(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model with shared index keys in which each retrieval head has its own, equal ones."""
    config = model.rtpurbo_config
    twin = restore(copy.deepcopy(model))
    sparsify(twin, replace(config, indexer=replace(config.indexer, shared_keys=False)))
    for module, shared in zip(headwise_modules(twin), headwise_modules(model), strict=True):
        group = module.num_attention_heads // module.num_key_value_heads
        full = sorted({head // group for head in module.retrieval_heads})
        if module.retrieval_heads:
            module.indexer.query_weight.data.copy_(shared.indexer.query_weight)
        for number, head in enumerate(module.retrieval_heads):
            shared_weight = shared.indexer.key_weight[full.index(head // group)]
            module.indexer.key_weight.data[number].copy_(shared_weight)
    return twin


def padded_batch(
    padding: Sequence[int] = PADDING, length: int = LENGTH, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random token ids with left padding, and their attention mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (len(padding), length), generator=generator)
    mask = torch.ones_like(ids)
    for row, pad in enumerate(padding):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return ids, mask


@torch.no_grad()
def logits_of(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    chunks: Sequence[int] | None = None,
    cache: Any = None,
) -> Tensor:
    """Logits of every token, with positions as `generate` gives them.

    Args:
        model: dense or sparse.
        ids: [batch, length].
        mask: [batch, length].
        chunks: lengths of consecutive forwards over the cache; None for one forward without it.
        cache: filled by the forwards; tokens that it holds already are in `mask`, not in `ids`.
    """
    held = mask.shape[1] - ids.shape[1]
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, held:]
    if chunks is None:
        return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    outputs, start = [], 0
    for size in chunks:
        end = start + size
        output = model(
            ids[:, start:end],
            attention_mask=mask[:, : held + end],
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        outputs.append(output.logits)
        start = end
    assert start == ids.shape[1], "the chunks must cover the ids"
    return torch.cat(outputs, 1)


def assert_same_logits(actual: Tensor, expected: Tensor, mask: Tensor, tolerance=1e-4) -> None:
    """Real tokens agree to `tolerance`, relative to the largest logit."""
    real, actual = mask[:, -actual.shape[1] :].bool(), actual.to(expected.dtype)
    scale = expected[real].abs().max().item()
    torch.testing.assert_close(actual[real], expected[real], rtol=tolerance, atol=tolerance * scale)

"""What differs between model families, as data. One attention module serves them all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from rtpurbo.errors import RTPurboError


@dataclass(frozen=True)
class Family:
    """How a family's attention module is built.

    Attributes:
        fused_projection: query, key and value come from one `qkv_proj`.
        query_key_norm: `per_head` normalises each head, `whole` normalises before the heads are
            split.
        unit_offset_norms: the factor of its norms is 1 + weight, multiplied in fp32.
        attention_projections: names of the attention's linear layers.
        other_projections: names of the linear layers beside the attention, for LoRA.
    """

    fused_projection: bool = False
    query_key_norm: Literal["none", "per_head", "whole"] = "none"
    unit_offset_norms: bool = False
    attention_projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    other_projections: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "smollm3": Family(),
    "qwen2": Family(),
    "qwen3": Family(query_key_norm="per_head"),
    # The experts of a mixture are not plain linear layers.
    "qwen3_moe": Family(query_key_norm="per_head", other_projections=()),
    "gemma3_text": Family(query_key_norm="per_head", unit_offset_norms=True),
    "olmo2": Family(query_key_norm="whole"),
    "phi3": Family(
        fused_projection=True,
        attention_projections=("qkv_proj", "o_proj"),
        other_projections=("gate_up_proj", "down_proj"),
    ),
}


def family_of(config: Any) -> Family:
    """The family of a transformers configuration.

    Raises:
        RTPurboError: the architecture is not supported, or it is used in a way that is not.
    """
    if config.model_type not in FAMILIES:
        raise RTPurboError(
            f"the architecture '{config.model_type}' is not supported; "
            f"supported are: {', '.join(sorted(FAMILIES))}."
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise RTPurboError(
            "models that cap their attention logits (attn_logit_softcapping) are not supported."
        )
    if not any(convertible_layers(config)):
        raise RTPurboError(
            f"every layer of this {config.model_type} model already attends to a sliding window of "
            f"{config.sliding_window} keys, so there is nothing to make sparse."
        )
    return FAMILIES[config.model_type]


def convertible_layers(config: Any) -> list[bool]:
    """For each layer, whether it has full attention; windowed layers stay as they are."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None or window is None:
        windowed = window is not None and not window_covers_context(config, window)
        return [not windowed] * config.num_hidden_layers
    return [kind == "full_attention" or window_covers_context(config, window) for kind in types]


def head_dim_of(config: Any) -> int:
    """Dimensions of a head, which older configurations leave to be worked out."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def window_covers_context(config: Any, window: int) -> bool:
    """Whether a model's own sliding window is as long as its context, and so no window at all."""
    return window >= config.max_position_embeddings


def attention_modules(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str, Any]]:
    """Each decoder layer in order: (layer, name of its attention, attention module)."""
    for layer in model.base_model.layers:
        yield layer, "self_attn", layer.self_attn

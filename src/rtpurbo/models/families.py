"""Families with a fused KV append: how their attention modules project and normalise.

Models of other families are made sparse too; their own code writes to the cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Family:
    """Structure of a family's attention module.

    Attributes:
        fused_projection: query, key and value come from one `qkv_proj`.
        query_key_norm: `per_head` normalises each head, `whole` normalises before the heads are
            split.
        unit_offset_norms: the factor of its norms is 1 + weight, multiplied in fp32.
    """

    fused_projection: bool = False
    query_key_norm: Literal["none", "per_head", "whole"] = "none"
    unit_offset_norms: bool = False


WITHOUT_ATTENTION = ("linear_attention", "conv", "mlp", "moe")
"""Layer types of transformers that have no keys and values."""

FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(),
    "smollm3": Family(),
    "qwen2": Family(),
    "qwen3": Family(query_key_norm="per_head"),
    "qwen3_moe": Family(query_key_norm="per_head"),
    "gemma3_text": Family(query_key_norm="per_head", unit_offset_norms=True),
    "olmo2": Family(query_key_norm="whole"),
    "phi3": Family(fused_projection=True),
}

"""Families whose decoding steps have a fast path: how their attention modules project and norm, as data.

A model of any other family is made sparse too; its tokens enter the cache through its own code.
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

"""What models name their arguments; transformers 5.24 calls `cache` what was `past_key_values`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import CausalLMOutputWithPast

OLD_CACHE_NAME = "past_key_values"
# The name that models and `generate` go by, whichever of the two a caller writes.
CACHE_NAME = (
    "cache"
    if any(field.name == "cache" for field in fields(CausalLMOutputWithPast))
    else OLD_CACHE_NAME
)
# How every family names what may also be given without a name.
POSITIONAL = ("input_ids", "attention_mask", "position_ids", CACHE_NAME, "inputs_embeds")


def named(
    arguments: Sequence[Any], keywords: dict[str, Any], names: Sequence[str] = POSITIONAL
) -> dict[str, Any]:
    """All arguments of a model's forward by their names, the cache by its present one."""
    everything = {**dict(zip(names, arguments, strict=False)), **keywords}
    if OLD_CACHE_NAME != CACHE_NAME and OLD_CACHE_NAME in everything:
        cache = everything.pop(OLD_CACHE_NAME)
        if everything.get(CACHE_NAME) is None:
            everything[CACHE_NAME] = cache
    return everything

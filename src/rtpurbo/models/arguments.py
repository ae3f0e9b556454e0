"""Argument names of models; transformers 5.24 renamed `past_key_values` to `cache`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from inspect import signature
from typing import Any

from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

OLD_CACHE_NAME = "past_key_values"
# The name that models and `generate` go by, whichever of the two a caller writes.
CACHE_NAME = (
    "cache"
    if any(field.name == "cache" for field in fields(CausalLMOutputWithPast))
    else OLD_CACHE_NAME
)


@cache
def names_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    """The arguments of the forward of a module's class in their order, which differs between models."""
    return tuple(signature(forward).parameters)[1:]


def named(module: nn.Module, arguments: Sequence[Any], keywords: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a model's forward by their names, the cache by its present one."""
    names = names_of(type(module).forward)[: len(arguments)]
    everything = {**dict(zip(names, arguments, strict=True)), **keywords}
    if OLD_CACHE_NAME != CACHE_NAME and OLD_CACHE_NAME in everything:
        given = everything.pop(OLD_CACHE_NAME)
        if everything.get(CACHE_NAME) is None:
            everything[CACHE_NAME] = given
    return everything


def positions_follow_mask(model: nn.Module) -> bool:
    """True if a position embedding of the model reads the attention mask where no positions are given, as OPT's."""
    return any(
        isinstance(module, nn.Embedding) and "attention_mask" in names_of(type(module).forward)
        for module in model.modules()
    )

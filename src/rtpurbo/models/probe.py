"""What a model's attention is like, found by running it on a few tokens.

transformers calls one function of every layer that attends (`AttentionInterface`). The probe puts
itself there for one forward and notes what it is given; nothing has to be known of the model's family.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import context_length, convertible_layers
from rtpurbo.models.decoder import decoder_layers, decoder_of
from rtpurbo.models.rotation import Embeddings, RotaryLayout, measure
from rtpurbo.models.unconverted import unconverted_attention

IMPLEMENTATION = "rtpurbo-probe"
# Enough to tell apart the columns of a rotary embedding (`rtpurbo.models.rotation`) several times over.
NUM_TOKENS = 40
# Arguments of the attention function that change nothing for a causal layer.
HARMLESS = frozenset({"sliding_window", "s_aux", "is_causal", "position_ids", "cache_position"})


@dataclass
class AttentionTraits:
    """What one layer's attention is like.

    Attributes:
        module: the attention module.
        num_attention_heads: query heads.
        num_key_value_heads: KV heads.
        head_dim: dimensions of queries and keys.
        value_dim: dimensions of values.
        scaling: factor on the dot products.
        rotation: how heads are rotated; None if that could not be found out.
        refusal: why the layer cannot be made sparse; None if it can.
    """

    module: nn.Module
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    value_dim: int
    scaling: float
    rotation: RotaryLayout | None = None
    refusal: str | None = None


@dataclass
class _Record:
    """What was seen of one attention module."""

    calls: list[tuple[Tensor, Tensor, Tensor, dict[str, Any]]] = field(default_factory=list)
    inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None


_records: list[dict[nn.Module, _Record]] = []


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function while a model is probed."""
    record = _records[-1].setdefault(module, _Record())
    record.calls.append((query, key, value, kwargs))
    # The probe's rotary embedding is in float32, whatever the model's type.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return unconverted_attention(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _record)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def probe(model: PreTrainedModel) -> dict[int, AttentionTraits]:
    """What the attention of each layer is like that can be made sparse.

    Args:
        model: dense or sparse; it is run on a few tokens.

    Raises:
        RTPurboError: a layer that should be convertible by the configuration is not, with the reason.
    """
    records = _run(model)
    converted = convertible_layers(model.config)
    traits = {}
    for number, layer in enumerate(decoder_layers(model)):
        if not converted[number]:
            continue
        seen = [(module, records[module]) for module in layer.modules() if module in records]
        if len(seen) != 1:
            raise RTPurboError(
                f"layer {number} of this {model.config.model_type} model cannot be made sparse: it calls "
                f"transformers' attention interface {len(seen)} times."
            )
        module, record = seen[0]
        found = _traits(module, record)
        if found.refusal is not None:
            raise RTPurboError(
                f"layer {number} of this {model.config.model_type} model cannot be made sparse: "
                f"{found.refusal}."
            )
        traits[number] = found
        if record.inputs is not None:
            found.rotation = _rotation(model, module, record)
    return traits


def _traits(module: nn.Module, record: _Record) -> AttentionTraits:
    query, key, value, kwargs = record.calls[0]
    scaling = kwargs.get("scaling")
    found = AttentionTraits(
        module,
        query.shape[1],
        key.shape[1],
        key.shape[-1],
        value.shape[-1],
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
    )
    unknown = [
        name
        for name, given in kwargs.items()
        if name not in HARMLESS and isinstance(given, Tensor) and name != "scaling"
    ]
    if kwargs.get("softcap") is not None:
        found.refusal = "it caps its attention logits"
    elif len(record.calls) > 1:
        found.refusal = "its attention module runs more than once in a forward"
    elif getattr(module, "is_causal", True) is False:
        found.refusal = "its attention is not causal"
    elif hasattr(module, "indexer") and vars(module).get("_rtpurbo") is None:
        found.refusal = "it selects keys by an indexer of its own"
    elif unknown:
        found.refusal = f"its attention takes {', '.join(sorted(unknown))}"
    elif query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1]:
        found.refusal = f"its queries {tuple(query.shape)} do not fit its keys {tuple(key.shape)}"
    return found


def _run(model: PreTrainedModel) -> dict[nn.Module, _Record]:
    """One forward, with the last token at the end of the context."""
    config = model.config
    device = model.get_input_embeddings().weight.device
    places = torch.arange(NUM_TOKENS, device=device)[None]
    arguments: dict[str, Any] = {
        "input_ids": (places + 2) % config.vocab_size,
        "attention_mask": torch.ones_like(places),
        "use_cache": False,
    }
    if "position_ids" in signature(type(decoder_of(model)).forward).parameters:
        # Frequencies may depend on the length: those of the whole context are wanted.
        positions = places.clone()
        positions[0, -1] = context_length(config) - 1
        arguments["position_ids"] = positions
    records: dict[nn.Module, _Record] = {}
    with probing(model, records), ExitStack() as hooks:
        for module in model.modules():
            hook = None
            if "layer_idx" in vars(module):
                hook = module.register_forward_pre_hook(partial(_note, records), with_kwargs=True)
            elif "rotary" in type(module).__name__.lower():
                hook = module.register_forward_pre_hook(_in_float32)
            if hook is not None:
                hooks.callback(hook.remove)
        decoder_of(model)(**arguments)
    return {module: record for module, record in records.items() if record.calls}


def _note(
    records: dict[nn.Module, _Record], module: nn.Module, args: tuple[Any, ...], kwargs: Any
) -> None:
    if kwargs.get("position_embeddings") is not None:
        records.setdefault(module, _Record()).inputs = (args, dict(kwargs))


def _in_float32(module: nn.Module, args: tuple[Any, ...]) -> Any:
    """Half precision would round slow frequencies."""
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        return (args[0].float(), *args[1:])
    return None


@contextmanager
def probing(model: PreTrainedModel, records: dict[nn.Module, _Record]) -> Iterator[None]:
    """Notes every call of the attention function inside a `with` block."""
    before = model.config._attn_implementation
    training = [module for module in model.modules() if module.training]
    model.eval()
    _records.append(records)
    model.config._attn_implementation = IMPLEMENTATION
    try:
        with torch.no_grad():
            yield
    finally:
        model.config._attn_implementation = before
        _records.pop()
        for module in training:
            module.training = True


def _rotation(model: PreTrainedModel, module: nn.Module, record: _Record) -> RotaryLayout | None:
    assert record.inputs is not None
    args, kwargs = record.inputs

    def run(embeddings: Embeddings) -> Tensor:
        records: dict[nn.Module, _Record] = {}
        with probing(model, records):
            module(*args, **{**kwargs, "position_embeddings": embeddings})
        query, key, _, _ = records[module].calls[0]
        return torch.cat([query, key], 1)

    return measure(kwargs["position_embeddings"], run)

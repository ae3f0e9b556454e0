"""Properties of a model's attention, found by running it on a few tokens.

Attention layers of transformers call a registered function (`AttentionInterface`). The probe registers
one that records its arguments, so it needs no knowledge of the model's family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from rtpurbo.errors import RTPurboError, first_line
from rtpurbo.models.architecture import context_length, convertible_layers
from rtpurbo.models.arguments import names_of
from rtpurbo.models.decoder import decoder_layers, decoder_of, evaluating
from rtpurbo.models.rotation import Embeddings, RotaryLayout, RotaryProbe

IMPLEMENTATION = "rtpurbo-probe"
# Enough to distinguish the columns of a rotary embedding (`rtpurbo.models.rotation`) several times over.
NUM_TOKENS = 40
# Arguments of the attention function that change nothing for a causal layer.
HARMLESS = frozenset(
    {"scaling", "sliding_window", "s_aux", "is_causal", "position_ids", "cache_position"}
)


@dataclass(eq=False)
class AttentionTraits:
    """Properties of one layer's attention.

    Attributes:
        module: the attention module.
        num_attention_heads: query heads.
        num_key_value_heads: KV heads.
        head_dim: dimensions of queries and keys.
        value_dim: dimensions of values.
        scaling: factor on the dot products.
        rotation: layout of the rotary embedding; None if it is unknown.
    """

    module: nn.Module
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    value_dim: int
    scaling: float
    rotation: RotaryLayout | None = None


@dataclass
class _Record:
    """Calls of the attention function by one attention module, and its rotary embedding."""

    calls: list[tuple[Tensor, Tensor, Tensor, Any, dict[str, Any]]] = field(default_factory=list)
    embeddings: Embeddings | None = None

    @property
    def states(self) -> Tensor:
        """Queries and keys of the first call."""
        query, key, *_ = self.calls[0]
        return torch.cat([query, key], 1)


_Records = dict[nn.Module, _Record]
_recordings: list[_Records] = []

# Conversion makes a model sparse several times; each probe is three forwards.
_known: WeakKeyDictionary[
    PreTrainedModel, tuple[tuple[str, torch.device, torch.dtype], dict[int, AttentionTraits]]
] = WeakKeyDictionary()


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention function that records its arguments.

    It returns zeros, so that hidden states do not depend on it.
    """
    record = _recordings[-1].setdefault(module, _Record())
    record.calls.append((query, key, value, attention_mask, kwargs))
    batch, heads, length, _ = query.shape
    return value.new_zeros(batch, length, heads, value.shape[-1]), None


AttentionInterface.register(IMPLEMENTATION, _record)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def probe(model: PreTrainedModel) -> dict[int, AttentionTraits]:
    """Finds the properties of the attention of each layer that can be made sparse.

    Args:
        model: dense or sparse; it runs on a few tokens, once until it changes.

    Raises:
        RTPurboError: a layer that should be convertible by the configuration is not, with the reason.
    """
    state = (model.config.to_json_string(), model.device, model.dtype)
    known = _known.get(model)
    if known is not None and known[0] == state and _are_in(model, known[1]):
        return known[1]
    traits = _probe(model)
    _known[model] = state, traits
    return traits


def _are_in(model: PreTrainedModel, traits: Mapping[int, AttentionTraits]) -> bool:
    """True if the attention modules that were probed are still those of the model."""
    modules = set(model.modules())
    return all(found.module in modules for found in traits.values())


def _probe(model: PreTrainedModel) -> dict[int, AttentionTraits]:
    """Runs the forwards of `probe`."""
    records = _run(model, {})
    converted = convertible_layers(model.config)
    traits = {}
    for number, layer in enumerate(decoder_layers(model)):
        if not converted[number]:
            continue
        seen = [(module, records[module]) for module in layer.modules() if module in records]
        prefix = f"layer {number} of this {model.config.model_type} model cannot be made sparse:"
        if not seen:
            raise RTPurboError(
                f"{prefix} in transformers {transformers.__version__}, its attention does not use the "
                "AttentionInterface: try a newer version."
            )
        if len(seen) > 1:
            raise RTPurboError(
                f"{prefix} it calls transformers' attention interface {len(seen)} times."
            )
        reason = _refusal(*seen[0])
        if reason is not None:
            raise RTPurboError(f"{prefix} {reason}.")
        traits[number] = _traits(*seen[0])
    _measure_rotations(model, records, list(traits.values()))
    return traits


def _measure_rotations(
    model: PreTrainedModel, records: _Records, traits: list[AttentionTraits]
) -> None:
    """Measures the rotary embedding of each layer in two more forwards."""
    probes = {}
    for found in traits:
        rotary = RotaryProbe.of(records[found.module].embeddings)
        if rotary is not None:
            probes[found.module] = rotary
    if not probes:
        return
    plain = _run(model, {module: rotary.plain for module, rotary in probes.items()})
    coded = _run(model, {module: rotary.coded for module, rotary in probes.items()})
    for found in traits:
        module = found.module
        if module in probes:
            found.rotation = probes[module].layout(plain[module].states, coded[module].states)


def _traits(module: nn.Module, record: _Record) -> AttentionTraits:
    query, key, value, _, kwargs = record.calls[0]
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    sizes = query.shape[1], key.shape[1], key.shape[-1], value.shape[-1]
    return AttentionTraits(module, *sizes, scaling)


def _refusal(module: nn.Module, record: _Record) -> str | None:
    """Returns the reason why a layer cannot be made sparse; None if it can."""
    query, key, _, mask, kwargs = record.calls[0]
    unknown = [
        name for name, given in kwargs.items() if name not in HARMLESS and isinstance(given, Tensor)
    ]
    if kwargs.get("softcap") is not None:
        return "it caps its attention logits"
    if isinstance(mask, Tensor) and (mask.is_floating_point() or mask.shape[1] > 1):
        return "it adds a mask of its own to its attention logits"
    if len(record.calls) > 1:
        return "its attention module runs more than once in a forward"
    if getattr(module, "is_causal", True) is False:
        return "its attention is not causal"
    if hasattr(module, "indexer") and vars(module).get("_rtpurbo") is None:
        return "it selects keys by an indexer of its own"
    if unknown:
        return f"its attention takes {', '.join(sorted(unknown))}"
    if query.shape[2] != key.shape[2] or query.shape[1] % key.shape[1]:
        return f"its queries {tuple(query.shape)} do not fit its keys {tuple(key.shape)}"
    return None


def _run(model: PreTrainedModel, embeddings: Mapping[nn.Module, Embeddings]) -> _Records:
    """Runs one forward, with the last token at the end of the context.

    The `embeddings` replace the model's own rotary ones, by attention module.

    Raises:
        RTPurboError: the model fails.
    """
    config, decoder = model.config, decoder_of(model)
    device = model.get_input_embeddings().weight.device
    places = torch.arange(NUM_TOKENS, device=device)[None]
    arguments: dict[str, Any] = {
        "input_ids": (places + 2) % config.vocab_size,
        "attention_mask": torch.ones_like(places),
        "use_cache": False,
    }
    if "position_ids" in names_of(type(decoder).forward):
        # Frequencies may depend on the length: those for the whole context are needed.
        positions = places.clone()
        positions[0, -1] = context_length(config) - 1
        arguments["position_ids"] = positions
    records: _Records = {}
    try:
        with _probing(model, records, embeddings):
            decoder(**arguments)
    except torch.OutOfMemoryError:  # says nothing about the model
        raise
    except Exception as error:  # code of any model runs here
        raise RTPurboError(
            f"this {config.model_type} model cannot be made sparse: a forward of {NUM_TOKENS} tokens failed "
            f"({first_line(error, with_type=True)})."
        ) from error
    return {module: record for module, record in records.items() if record.calls}


@contextmanager
def _probing(
    model: PreTrainedModel, records: _Records, embeddings: Mapping[nn.Module, Embeddings]
) -> Iterator[None]:
    """Records the calls of the attention function inside a `with` block; arguments as of `_run`."""

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        """Records the rotary embedding of a module, or replaces it."""
        records.setdefault(module, _Record()).embeddings = kwargs.get("position_embeddings")
        if module not in embeddings:
            return None
        return args, {**kwargs, "position_embeddings": embeddings[module]}

    before = model.config._attn_implementation
    hooks = []
    for module in model.modules():
        if "layer_idx" in vars(module):
            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))
        elif "rotary" in type(module).__name__.lower():
            hooks.append(module.register_forward_pre_hook(_in_float32))
    _recordings.append(records)
    model.config._attn_implementation = IMPLEMENTATION
    try:
        with torch.no_grad(), evaluating(model):
            yield
    finally:
        model.config._attn_implementation = before
        _recordings.pop()
        for hook in hooks:
            hook.remove()


def _in_float32(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Runs a rotary embedding in float32: half precision would round low frequencies."""
    if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
        return (args[0].float(), *args[1:])
    return None

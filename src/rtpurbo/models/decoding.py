"""Decode steps replayed as a CUDA graph: one launch for a whole step instead of thousands.

A sparse model does this on a GPU for decode steps over a `HeadwiseCache`: in `generate` (greedy,
sampling, beams) and in plain calls under `torch.no_grad()`. The cache is made static, the step is
captured, and later steps replay it. `model.rtpurbo_graphs = False` turns it off.

A replay runs no Python code of the model, so steps run without a graph while the model is observed
from inside (`observing`, `counting`, hooks of its modules).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.errors import RTPurboError, first_line
from rtpurbo.models.arguments import CACHE_NAME, positions_follow_mask
from rtpurbo.models.cache import HeadwiseCache, roomy_capacity
from rtpurbo.models.cache_layers import HeadwiseLayer
from rtpurbo.models.graphs import CudaGraph
from rtpurbo.models.sparse_layer import SparseAttention
from rtpurbo.models.sparse_layers import headwise_modules

# A capture takes about as long as this many steps without a graph.
CAPTURE_COST_IN_STEPS = 16
# Steps without a graph before a capture, if the number of steps is not known.
STEPS_BEFORE_CAPTURE = 4
# Largest number of graphs of a model, each for one cache.
MOST_GRAPHS = 4
# Arguments that a replay supports or may ignore.
FOLLOWED = {
    *("input_ids", "attention_mask", "position_ids", CACHE_NAME, "inputs_embeds"),
    *("use_cache", "return_dict", "logits_to_keep", "cache_position"),
}


@dataclass
class PreparedStep:
    """Captured step of one cache, valid until a tensor, rule or backend that it uses changes.

    It reads tokens and position_ids from `inputs`, [batch, 1] each.
    """

    inputs: tuple[Tensor, Tensor]
    run: Callable[[], Tensor]
    output_class: type
    held: list[tuple[Any, str, Tensor]]
    rules: list[tuple[Any, str]]
    weights_address: int

    def fits(
        self, cache: HeadwiseCache, batch: int, modules: list[SparseAttention], address: int
    ) -> bool:
        """True if the captured step still equals a step of the model."""
        return (
            cache.is_static
            and cache.get_seq_length() < cache.slots.capacity
            and self.inputs[0].shape[0] == batch
            and self.weights_address == address
            and all(getattr(owner, name) is tensor for owner, name, tensor in self.held)
            and all(
                module.rule is rule and module.backend == backend
                for module, (rule, backend) in zip(modules, self.rules, strict=True)
            )
        )


class GraphedDecoder:
    """Replays a model's decode steps; has one graph for each cache, until the cache is freed."""

    graph_class: Any = CudaGraph

    def __init__(self) -> None:
        self._prepared: WeakKeyDictionary[HeadwiseCache, PreparedStep] = WeakKeyDictionary()
        self._steps_before: WeakKeyDictionary[HeadwiseCache, int] = WeakKeyDictionary()
        self._refused: WeakSet[HeadwiseCache] = WeakSet()
        self._has_failed = False
        self._modules: list[SparseAttention] = []
        self._warned: set[str] = set()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles as a new decoder: a copied model has its own tensors."""
        return GraphedDecoder, ()

    def step(self, model: PreTrainedModel, arguments: dict[str, Any]) -> Any:
        """Returns the result of the captured step; None if the model's own forward has to run."""
        if self._has_failed or not self._is_step(model, arguments):
            return None
        ids, cache = arguments["input_ids"], arguments[CACHE_NAME]
        modules = self._watched_modules(model)
        if modules is None or not self._can_be_static(model, arguments):
            return None
        address = model.get_output_embeddings().weight.data_ptr()
        prepared = self._prepared.get(cache)
        if prepared is None or not prepared.fits(cache, ids.shape[0], modules, address):
            del prepared
            self._prepared.pop(cache, None)  # first, so that the next capture can reuse its memory
            if not self._is_profitable(cache):
                return None
            prepared = self._prepare(model, arguments, modules, address)
            if prepared is None:
                return None
            while len(self._prepared) >= MOST_GRAPHS:
                self._prepared.pop(next(iter(self._prepared)))
            self._prepared[cache] = prepared
        seen = cache.get_seq_length()
        _fill(prepared.inputs, arguments, seen)
        logits = prepared.run()
        cache.set_length(seen + 1)
        return prepared.output_class(logits=logits.clone(), **{CACHE_NAME: cache})

    def _is_step(self, model: PreTrainedModel, arguments: dict[str, Any]) -> bool:
        """True if this is a decode step whose only output is logits."""
        ids, cache = arguments.get("input_ids"), arguments.get(CACHE_NAME)
        if not isinstance(cache, HeadwiseCache) or not isinstance(ids, Tensor):
            return False
        return (
            ids.shape[1] == 1
            and self.graph_class.supports(ids.device)
            and not torch.is_grad_enabled()
            and not model.training
            and getattr(model, "rtpurbo_graphs", True)
            and cache.get_seq_length() > 0
            and arguments.get("inputs_embeds") is None
            and arguments.get("use_cache") is not False
            and arguments.get("return_dict") is not False
            and isinstance(arguments.get("logits_to_keep", 0), int)
            and all(
                value is None or value is False or name in FOLLOWED
                for name, value in arguments.items()
            )
            and not any(
                getattr(model.config, f"output_{extra}", False)
                for extra in ("attentions", "hidden_states", "router_logits")
            )
            and not torch.is_autocast_enabled(ids.device.type)
            and not torch.compiler.is_compiling()
        )

    def _watched_modules(self, model: PreTrainedModel) -> list[SparseAttention] | None:
        """Returns the sparse layers; None if they are observed, dense or eager."""
        if not self._modules:
            self._modules = headwise_modules(model)
        for module in self._modules:
            watched = module.statistics is not None or module.observer is not None
            watched = watched or module.selector is not None
            if watched or module.dense or module.backend == "eager":
                return None
        return self._modules

    def _can_be_static(self, model: PreTrainedModel, arguments: dict[str, Any]) -> bool:
        cache = arguments[CACHE_NAME]
        if cache in self._refused:
            return False
        if cache.padding == "any":
            self._warn("a sequence has padding between its tokens")
            return False
        # A captured step has positions, which such a model would derive from the mask.
        has_positions = cache.padding == "none" or arguments.get("position_ids") is not None
        if not has_positions and positions_follow_mask(model):
            return False
        return cache.can_be_static and cache.slots.have_begun

    def _is_profitable(self, cache: HeadwiseCache) -> bool:
        """True if enough steps are expected, or have run, for a capture."""
        remaining = cache.expected_length - cache.get_seq_length()
        if remaining > 0:
            return remaining > CAPTURE_COST_IN_STEPS
        steps = self._steps_before.get(cache, 0)
        self._steps_before[cache] = steps + 1
        # A static cache had a graph before, and outgrew its capacity or changed its sequences.
        return cache.is_static or steps >= STEPS_BEFORE_CAPTURE

    def _prepare(
        self,
        model: PreTrainedModel,
        arguments: dict[str, Any],
        modules: list[SparseAttention],
        address: int,
    ) -> PreparedStep | None:
        ids, cache = arguments["input_ids"], arguments[CACHE_NAME]
        reason = capture_refusal(model, ids.device)
        if reason is not None:
            self._has_failed = True
            self._warn(reason)
            return None
        seen = cache.get_seq_length()
        inputs = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.int64)
        outputs: list[Any] = []

        def step() -> Tensor:
            outputs[:] = [
                dense_class(model).forward(
                    model,
                    input_ids=inputs[0],
                    position_ids=inputs[1],
                    use_cache=True,
                    return_dict=True,
                    **{CACHE_NAME: cache},
                )
            ]
            return outputs[0].logits

        def rewind() -> None:
            cache.rewind(seen)

        reason = None
        try:
            capacity = roomy_capacity(seen + 1, cache.expected_length)
            if cache.slots.capacity < capacity:
                cache.make_static(capacity)
            _fill(inputs, arguments, seen)
            # Kernels are compiled and cached here, outside of the capture.
            step()
            rewind()
            reason = self.graph_class.refusal(modules)
            if reason is None:
                run = self.graph_class(step, rewind, ids.device)
                cache.set_length(seen)
        except RTPurboError:
            _undo(cache, seen)
            raise
        except Exception as error:
            reason = first_line(error, with_type=True)
            self._has_failed = not isinstance(error, torch.OutOfMemoryError)
        if reason is not None:
            _undo(cache, seen)
            self._refused.add(cache)
            self._warn(reason)
            return None
        cache.slots.end_forward()  # these tensors are in the graph's memory
        output_class = type(outputs.pop())
        return PreparedStep(
            inputs,
            run,
            output_class,
            list(_held(cache)),
            [(module.rule, module.backend) for module in modules],
            address,
        )

    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(
                f"decoding runs without a CUDA graph, and slower: {reason}.", stacklevel=2
            )


def _fill(inputs: tuple[Tensor, Tensor], arguments: dict[str, Any], seen: int) -> None:
    inputs[0].copy_(arguments["input_ids"])
    positions = arguments.get("position_ids")
    inputs[1].fill_(seen) if positions is None else inputs[1].copy_(positions)


def _undo(cache: HeadwiseCache, seen: int) -> None:
    """Sets a cache back to before a step that may have failed anywhere."""
    cache.make_growing()
    cache.set_length(seen)


def _held(cache: HeadwiseCache) -> Iterator[tuple[Any, str, Tensor]]:
    """Yields the tensors whose addresses a captured step uses, with owner and name."""
    owners: list[tuple[Any, str]] = [(cache.slots.ring, "positions")]
    owners += [(cache.slots, name) for name in ("first_slots", "fixed_positions", "length")]
    for owner, name in owners:
        yield owner, name, getattr(owner, name)
    for layer in cache.layers:
        if isinstance(layer, HeadwiseLayer):
            yield from layer.held_tensors()
        else:
            yield layer, "keys", layer.keys
            yield layer, "values", layer.values


def dense_class(model: PreTrainedModel) -> Any:
    """Returns the class that a sparse model had before; see `rtpurbo.models.sparse_model.sparse_class`."""
    return type(model).__mro__[2]


def capture_refusal(model: PreTrainedModel, device: torch.device) -> str | None:
    """Returns the reason why no step of this model can be captured; None if none is known."""
    if {parameter.device for parameter in model.parameters()} != {device}:
        return "the model's weights are not all on one device"
    rotary = getattr(model.base_model, "rotary_emb", None)
    kinds = getattr(rotary, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    if any("dynamic" in str(kind) for kind in kinds):
        return "the model's rotary embedding depends on the length"
    for module in model.modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        for hook in hooks if module is not model else ():
            package = str(getattr(hook, "__module__", "")).split(".")[0]
            if package not in ("rtpurbo", "transformers", "accelerate", "peft"):
                return f"a {type(module).__name__} within the model has a hook of its own"
    return None

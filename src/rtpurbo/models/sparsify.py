"""Makes a dense model sparse in place, and dense again; observes and measures sparse models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from transformers import PreTrainedModel

from rtpurbo.config import HeadMap, IndexerSettings, RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import AttentionShape, check_architecture, context_length
from rtpurbo.models.attention import IMPLEMENTATION
from rtpurbo.models.decoder import decoder_of
from rtpurbo.models.decoding import GraphedDecoder, dense_class
from rtpurbo.models.fused_append import attach_fused_append, detach_fused_append
from rtpurbo.models.indexer import TokenIndexer, slow_dimensions
from rtpurbo.models.probe import AttentionTraits, probe
from rtpurbo.models.rotation import invertible
from rtpurbo.models.runtime import Runtime
from rtpurbo.models.sparse_layer import (
    LayerObservation,
    SparseAttention,
    note_rotation,
)
from rtpurbo.models.sparse_layers import headwise_modules, is_sparse
from rtpurbo.models.sparse_model import CacheProvider, check_can_be_sparse, sparse_class
from rtpurbo.models.verification import NUM_TOKENS, check_equal, logits_over_cache, needs_check
from rtpurbo.ops import Selector

# Set on the instance of a sparse model.
_OWN_ATTRIBUTES = (
    *("_rtpurbo_dense_implementation", "_rtpurbo_artifact", "_rtpurbo_hook", "_rtpurbo_decoder"),
    *("rtpurbo_config", "rtpurbo"),
)


def sparsify(model: PreTrainedModel, config: RTPurboConfig) -> PreTrainedModel:
    """Makes the attention of every full-attention layer sparse, in place.

    A `SparseAttention` is attached to every attention module, which is kept. Indexer weights start at
    zero: train them, or load them with `load_indexers`.

    Args:
        model: a dense causal language model of any architecture that `check_architecture` lets pass.
        config: head map, rule and indexer settings.

    Returns:
        The same model.

    Raises:
        RTPurboError: the model cannot be made sparse, the head map belongs to another model, or the
            model is wrapped, offloaded or of another kind (`check_can_be_sparse`).
    """
    traits = _checked_traits(model)
    check_head_map(config.head_map, traits, model.config.num_hidden_layers)
    if config.indexer.min_wavelength is None:
        # Within the model's context, no kept pair completes a turn.
        wavelength = float(context_length(model.config))
        config = replace(config, indexer=replace(config.indexer, min_wavelength=wavelength))
    if config.indexer.index_space == "pre_rope":
        for number, found in traits.items():
            invertible(number, found.rotation)
    if is_sparse(model):
        restore(model)
    expected = logits_over_cache(model) if needs_check(model, config) else None
    for number, found in traits.items():
        _attach(SparseAttention(found, number, config), config.indexer)
    model._rtpurbo_dense_implementation = model.config._attn_implementation
    model.config._attn_implementation = IMPLEMENTATION
    model.rtpurbo_config = config
    _set_class(model, sparse_class(type(model)))
    provider = CacheProvider(model)
    model._rtpurbo_hook = decoder_of(model).register_forward_pre_hook(provider, with_kwargs=True)
    model._rtpurbo_decoder = GraphedDecoder()
    model.rtpurbo = runtime(model)
    if expected is not None:
        try:
            window = max(NUM_TOKENS, config.attention.sliding_window)
            with model.rtpurbo.rule(sliding_window=window):
                check_equal(model, expected)
        except RTPurboError:
            restore(model)
            raise
    return model


def _checked_traits(model: PreTrainedModel) -> dict[int, AttentionTraits]:
    """Properties of the layers that are converted, of a model that can be made sparse.

    Raises:
        RTPurboError: it cannot, with the reason.
    """
    check_can_be_sparse(model)
    check_architecture(model.config)
    return probe(model)


def _attach(layer: SparseAttention, settings: IndexerSettings) -> None:
    """Attaches a sparse layer to its attention module."""
    module: Any = layer.module
    if layer.retrieval_heads:
        weight = next(module.parameters())
        module.indexer = TokenIndexer(
            settings,
            len(layer.retrieval_heads),
            layer.layout(torch.device("cpu")).full_key_value_heads.numel(),
            feature_dimensions(layer, settings),
            weight.device,
            weight.dtype if weight.dtype.is_floating_point else torch.float32,
        )
        module.indexer.train(module.training)
    module._rtpurbo = layer
    layer.hook = module.register_forward_pre_hook(note_rotation, with_kwargs=True)
    attach_fused_append(layer)


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the model dense again; logits are then bit-identical to those before `sparsify`.

    Raises:
        RTPurboError: the model is not sparse.
    """
    for layer in headwise_modules(model):
        module: Any = layer.module
        layer.hook.remove()
        detach_fused_append(module)
        if layer.retrieval_heads:
            del module.indexer
        del module._rtpurbo
    model._rtpurbo_hook.remove()
    model.config._attn_implementation = model._rtpurbo_dense_implementation
    _set_class(model, dense_class(model))
    for name in _OWN_ATTRIBUTES:
        vars(model).pop(name, None)
    return model


def _set_class(model: PreTrainedModel, new: Any) -> None:
    model.__class__ = new
    if "_old_forward" in vars(model):  # that accelerate wraps
        model._old_forward = MethodType(new.forward, model)


def feature_dimensions(layer: SparseAttention, settings: IndexerSettings) -> list[int]:
    """Returns the dimensions of a head that the indexer of this layer projects: all, if RoPE is not known."""
    if settings.index_space != "low_frequency" or layer.rotation is None:
        return list(range(layer.head_dim))
    assert settings.min_wavelength is not None
    return slow_dimensions(layer.rotation.frequencies, settings.min_wavelength, settings.index_dim)


def runtime(model: PreTrainedModel) -> Runtime:
    """Returns the runtime settings of a sparse model, which are also `model.rtpurbo`.

    Raises:
        RTPurboError: the model is not sparse.
    """
    return Runtime(model, headwise_modules(model))


def set_selector(model: PreTrainedModel, selector: Selector | None) -> None:
    """Sets a selector of far keys that replaces the rule's; None restores the rule."""
    for module in headwise_modules(model):
        module.selector = selector


@contextmanager
def observing(
    model: PreTrainedModel, observer: Callable[[LayerObservation], None], *, dense: bool = True
) -> Iterator[None]:
    """Calls `observer` with the queries and keys of every converted layer in each forward, inside a `with` block.

    A dense model is sparse without retrieval heads meanwhile, and is restored afterwards. A sparse one runs dense too,
    unless `dense` is False.
    """
    borrowed = not is_sparse(model)
    if borrowed:
        sparsify(model, RTPurboConfig(empty_head_map(model)))
    try:
        with runtime(model).observed(observer, dense=dense):
            yield
    finally:
        if borrowed:
            restore(model)


def empty_head_map(model: PreTrainedModel) -> HeadMap:
    """Head map of a model without retrieval heads, with the numbers of heads that it attends with.

    Raises:
        RTPurboError: the model cannot be made sparse.
    """
    traits = _checked_traits(model)
    of_layers = [traits.get(number) for number in range(model.config.num_hidden_layers)]
    return HeadMap(
        tuple(None if found is None else () for found in of_layers),
        tuple(None if found is None else found.num_attention_heads for found in of_layers),
        tuple(None if found is None else found.num_key_value_heads for found in of_layers),
    )


def check_head_map(
    head_map: HeadMap, layers: Mapping[int, AttentionTraits | AttentionShape], num_layers: int
) -> None:
    """Refuses a head map that does not fit the heads of the `layers` of a model that are converted.

    Raises:
        RTPurboError: numbers of layers or heads differ, or the map converts other layers.
    """
    prefix = "the head map belongs to another model: it has"
    if len(head_map.retrieval_heads) != num_layers:
        raise RTPurboError(
            f"{prefix} {len(head_map.retrieval_heads)} layers, the model has {num_layers}."
        )
    if head_map.converted_layers != sorted(layers):
        raise RTPurboError(
            "the head map names other layers than those of this model that have full attention."
        )
    for number, found in layers.items():
        given = (head_map.num_query_heads(number), head_map.num_kv_heads(number))
        if given != (found.num_attention_heads, found.num_key_value_heads):
            raise RTPurboError(
                f"{prefix} {given[0]} query heads on {given[1]} KV heads in layer {number}, the model "
                f"has {found.num_attention_heads} on {found.num_key_value_heads}."
            )

"""Makes a dense model sparse in place, and dense again; watches and counts while it is sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.config import HeadMap, IndexerSettings, RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import (
    check_architecture,
    context_length,
    convertible_layers,
    num_key_value_heads,
)
from rtpurbo.models.attention import IMPLEMENTATION
from rtpurbo.models.entering import attach_fast_entry, detach_fast_entry
from rtpurbo.models.generation import attach_cache, detach_cache
from rtpurbo.models.indexer import TokenIndexer, slow_dimensions
from rtpurbo.models.probe import AttentionTraits, probe
from rtpurbo.models.runtime import Runtime
from rtpurbo.models.sparse_layer import (
    LayerObservation,
    SparseAttention,
    note_rotation,
)
from rtpurbo.models.sparse_layers import headwise_modules, is_sparse
from rtpurbo.models.sparse_model import check_can_be_sparse, dense_class, sparse_class
from rtpurbo.models.verification import NUM_TOKENS, check_equal, logits_over_cache, needs_check
from rtpurbo.ops import SelectionStatistics, Selector


def sparsify(model: PreTrainedModel, config: RTPurboConfig) -> PreTrainedModel:
    """Makes the attention of every full-attention layer sparse, in place.

    A `SparseAttention` hangs on every attention module, which stays. Indexer weights start at zero: train
    them, or load them with `load_indexers`.

    Args:
        model: a dense causal language model of any architecture that `check_architecture` lets pass.
        config: head map, rule and indexer settings.

    Returns:
        The same model.

    Raises:
        RTPurboError: the model cannot be made sparse, the head map belongs to another model, or the
            model is wrapped, offloaded or of another kind (`check_can_be_sparse`).
    """
    check_can_be_sparse(model)
    check_architecture(model.config)
    check_head_map(model.config, config.head_map)
    config = replace(config, indexer=resolve_indexer_settings(model, config.indexer))
    traits = probe(model)
    _check_traits(traits, config)
    if is_sparse(model):
        restore(model)
    expected = logits_over_cache(model) if needs_check(model, config) else None
    for number, found in traits.items():
        _attach(SparseAttention(found, number, config), config.indexer)
    model._rtpurbo_dense_implementation = model.config._attn_implementation
    model.config._attn_implementation = IMPLEMENTATION
    model.rtpurbo_config = config
    model.__class__ = sparse_class(type(model))
    attach_cache(model)
    model.rtpurbo = runtime(model)
    if expected is not None:
        try:
            window = max(NUM_TOKENS, config.attention.sliding_window)
            with using_rule(model, sliding_window=window):
                check_equal(model, expected)
        except RTPurboError:
            restore(model)
            raise
    return model


def _check_traits(traits: Mapping[int, AttentionTraits], config: RTPurboConfig) -> None:
    """Refuses what the probe found and the head map or the indexer cannot go with."""
    head_map = config.head_map
    expected = (head_map.num_attention_heads, head_map.num_key_value_heads)
    for number, found in traits.items():
        heads = (found.num_attention_heads, found.num_key_value_heads)
        if heads != expected:
            raise RTPurboError(
                f"layer {number} cannot be made sparse: it attends with {heads[0]} query heads on "
                f"{heads[1]} KV heads, not with the {expected[0]} on {expected[1]} of the head map."
            )
        undone = found.rotation is not None and found.rotation.partners is not None
        if config.indexer.index_space == "pre_rope" and not undone:
            raise RTPurboError(
                f"the rotary embedding of layer {number} cannot be undone, so index_space 'pre_rope' "
                "does not suit this model: choose 'low_frequency'."
            )


def _attach(layer: SparseAttention, settings: IndexerSettings) -> None:
    """Hangs a sparse layer on its attention module."""
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
    attach_fast_entry(layer)


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Makes the model dense again; logits are then bit-identical to those before `sparsify`.

    Raises:
        RTPurboError: the model is not sparse.
    """
    for layer in headwise_modules(model):
        module: Any = layer.module
        layer.hook.remove()
        detach_fast_entry(module)
        if layer.retrieval_heads:
            del module.indexer
        del module._rtpurbo
    detach_cache(model)
    model.config._attn_implementation = model._rtpurbo_dense_implementation
    model.__class__ = dense_class(model)
    for name in ("_rtpurbo_dense_implementation", "_rtpurbo_artifact", "rtpurbo_config", "rtpurbo"):
        vars(model).pop(name, None)
    return model


def resolve_indexer_settings(model: PreTrainedModel, settings: IndexerSettings) -> IndexerSettings:
    """Fixes a wavelength left open to the model's context: kept pairs never complete a turn."""
    if settings.min_wavelength is not None:
        return settings
    return replace(settings, min_wavelength=float(context_length(model.config)))


def feature_dimensions(layer: SparseAttention, settings: IndexerSettings) -> list[int]:
    """The dimensions of a head that the indexer of this layer projects.

    All of them where the rotation is not known.
    """
    if settings.index_space != "low_frequency" or layer.rotation is None:
        return list(range(layer.head_dim))
    assert settings.min_wavelength is not None
    return slow_dimensions(layer.rotation.frequencies, settings.min_wavelength, settings.index_dim)


def runtime(model: PreTrainedModel) -> Runtime:
    """The runtime settings of a sparse model, which are also `model.rtpurbo`.

    Raises:
        RTPurboError: the model is not sparse.
    """
    return Runtime(model, headwise_modules(model))


def set_rule(model: PreTrainedModel, **changes: Any) -> None:
    """Changes fields of the attention rule: `set_rule(model, top_p=0.9)`."""
    runtime(model).set_rule(**changes)


def set_selector(model: PreTrainedModel, selector: Selector | None) -> None:
    """Lets something else than the rule choose far keys where rows select; None gives it back."""
    for module in headwise_modules(model):
        module.selector = selector


def using_rule(model: PreTrainedModel, **changes: Any) -> AbstractContextManager[None]:
    """As `Runtime.rule`."""
    return runtime(model).rule(**changes)


def counting(
    model: PreTrainedModel, statistics: SelectionStatistics | None = None
) -> AbstractContextManager[SelectionStatistics]:
    """As `Runtime.counting`."""
    return runtime(model).counting(statistics)


def decoding_last(model: PreTrainedModel, num_decode_rows: int) -> AbstractContextManager[None]:
    """As `Runtime.decoding_last`."""
    return runtime(model).decoding_last(num_decode_rows)


def running_dense(model: PreTrainedModel) -> AbstractContextManager[None]:
    """As `Runtime.dense`."""
    return runtime(model).dense()


def gated_heads(
    model: PreTrainedModel, gates: Mapping[int, Tensor]
) -> AbstractContextManager[None]:
    """As `Runtime.gated`."""
    return runtime(model).gated(gates)


def packing(
    model: PreTrainedModel, document_lengths: Sequence[int] | None
) -> AbstractContextManager[None]:
    """As `Runtime.packed`."""
    return runtime(model).packed(document_lengths)


@contextmanager
def observing(
    model: PreTrainedModel, observer: Callable[[LayerObservation], None], *, dense: bool = True
) -> Iterator[None]:
    """Shows every converted layer's queries and keys to `observer`.

    A dense model is made sparse for the while (without retrieval heads) and restored after.

    Args:
        model: dense or sparse.
        observer: called once a layer and forward.
        dense: run attention dense, as the original; False runs a sparse model as it is.
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
    """A head map of this model without any retrieval head."""
    config = model.config
    return HeadMap.uniform(
        [], convertible_layers(config), config.num_attention_heads, num_key_value_heads(config)
    )


def check_head_map(config: Any, head_map: HeadMap) -> None:
    """Refuses a head map that does not fit a transformers configuration.

    Raises:
        RTPurboError: it has another shape, or leaves out other layers than those with windows.
    """
    shape = (config.num_hidden_layers, config.num_attention_heads, num_key_value_heads(config))
    given = (
        len(head_map.retrieval_heads),
        head_map.num_attention_heads,
        head_map.num_key_value_heads,
    )
    if shape != given:
        raise RTPurboError(
            "the head map belongs to another model: it has (layers, query heads, KV heads) = "
            f"{given}, the model has {shape}."
        )
    converted = [heads is not None for heads in head_map.retrieval_heads]
    if converted != convertible_layers(config):
        raise RTPurboError(
            "the head map names other layers than those of this model that have full attention."
        )

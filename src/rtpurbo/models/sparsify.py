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
from rtpurbo.models.attention import IMPLEMENTATION, HeadwiseAttention, LayerObservation
from rtpurbo.models.families import attention_modules, convertible_layers, family_of
from rtpurbo.models.generation import attach_cache, detach_cache
from rtpurbo.models.indexer import TokenIndexer, slow_dimensions
from rtpurbo.models.runtime import Runtime
from rtpurbo.models.sparse_model import (
    check_can_be_sparse,
    check_is_not_wrapped,
    dense_class,
    sparse_class,
)
from rtpurbo.ops import SelectionStatistics, Selector


def sparsify(model: PreTrainedModel, config: RTPurboConfig) -> PreTrainedModel:
    """Replaces the attention of every full-attention layer by `HeadwiseAttention`, in place.

    Indexer weights start at zero: train them, or load them with `load_indexers`.

    Args:
        model: a dense model of a supported family.
        config: head map, rule and indexer settings.

    Returns:
        The same model.

    Raises:
        RTPurboError: the architecture is not supported, the head map belongs to another model, or the
            model is wrapped, offloaded or of another kind (`check_can_be_sparse`).
    """
    check_can_be_sparse(model)
    family = family_of(model.config)
    check_head_map(model.config, config.head_map)
    if is_sparse(model):
        restore(model)
    config = replace(config, indexer=resolve_indexer_settings(model, config.indexer))
    for layer, name, original in attention_modules(model):
        heads = config.head_map.retrieval_heads[original.layer_idx]
        if heads is None:
            continue
        indexer = None
        if heads:
            weight = next(original.parameters())
            features = feature_dimensions(model, original, config.indexer)
            dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
            num_full = len(config.head_map.full_key_value_heads(original.layer_idx))
            indexer = TokenIndexer(
                config.indexer, len(heads), num_full, features, weight.device, dtype
            )
        module = HeadwiseAttention(original, family, config, indexer)
        module.train(original.training)
        setattr(layer, name, module)
    model._rtpurbo_dense_implementation = model.config._attn_implementation
    model.config._attn_implementation = IMPLEMENTATION
    model.rtpurbo_config = config
    model.__class__ = sparse_class(type(model))
    attach_cache(model)
    model.rtpurbo = runtime(model)
    return model


def restore(model: PreTrainedModel) -> PreTrainedModel:
    """Puts the original attention modules back; logits are then bit-identical to the dense model's.

    Raises:
        RTPurboError: the model is not sparse.
    """
    modules = headwise_modules(model)
    for layer, name, module in attention_modules(model):
        if isinstance(module, HeadwiseAttention):
            module.original.train(module.training)
            setattr(layer, name, module.original)
    assert modules
    detach_cache(model)
    model.config._attn_implementation = model._rtpurbo_dense_implementation
    model.__class__ = dense_class(model)
    for name in ("_rtpurbo_dense_implementation", "_rtpurbo_artifact", "rtpurbo_config", "rtpurbo"):
        vars(model).pop(name, None)
    return model


def is_sparse(model: PreTrainedModel) -> bool:
    """Whether `sparsify` was applied and not undone."""
    return getattr(model, "rtpurbo_config", None) is not None


def headwise_modules(model: PreTrainedModel) -> list[HeadwiseAttention]:
    """The sparse attention modules in layer order.

    Raises:
        RTPurboError: the model is not sparse.
    """
    check_is_not_wrapped(model)
    if not is_sparse(model):
        raise RTPurboError(
            "the model is dense: pass it through rtpurbo.sparsify or rtpurbo.load first."
        )
    return [
        module for _, _, module in attention_modules(model) if isinstance(module, HeadwiseAttention)
    ]


def resolve_indexer_settings(model: PreTrainedModel, settings: IndexerSettings) -> IndexerSettings:
    """Fixes a wavelength left open to the model's context: kept pairs never complete a turn."""
    if settings.min_wavelength is not None:
        return settings
    return replace(settings, min_wavelength=float(model.config.max_position_embeddings))


def feature_dimensions(
    model: PreTrainedModel, attention: Any, settings: IndexerSettings
) -> list[int]:
    """The dimensions of a head that the indexer of this layer projects."""
    if settings.index_space != "low_frequency" or not getattr(attention, "use_rope", True):
        return list(range(attention.head_dim))
    assert settings.min_wavelength is not None
    return slow_dimensions(
        inverse_frequencies(model), attention.head_dim, settings.min_wavelength, settings.index_dim
    )


def inverse_frequencies(model: PreTrainedModel) -> Tensor:
    """Radians a token of each rotary pair of the full-attention layers."""
    rotary = model.base_model.rotary_emb
    # Gemma 3 keeps one set for each kind of layer.
    return rotary.inv_freq if hasattr(rotary, "inv_freq") else rotary.full_attention_inv_freq


def indexers_in_float32(model: PreTrainedModel) -> None:
    """Makes the indexers' weights float32 where they are shorter, for training: updates would be rounded away."""
    for module in headwise_modules(model):
        if module.retrieval_heads and module.indexer.query_weight.dtype.itemsize < 4:
            module.indexer.float()


def indexer_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The indexers' weights by name, on the CPU in fp32, as `load_indexers` takes them."""
    weights = {}
    for module in headwise_modules(model):
        if module.retrieval_heads:
            for name, value in module.indexer.named_parameters():
                weights[f"layers.{module.layer_idx}.indexer.{name}"] = (
                    value.detach().float().cpu().clone()
                )
    return weights


def load_indexers(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Copies indexer weights into a sparse model.

    Raises:
        RTPurboError: names or shapes differ from what the head map and the indexer settings ask
            for.
    """
    expected = {name: value.shape for name, value in indexer_weights(model).items()}
    given = {name: value.shape for name, value in weights.items()}
    if expected != given:
        wrong = sorted(set(expected.items()) ^ set(given.items()))[0][0]
        raise RTPurboError(
            f"the indexer weights do not fit the configuration: '{wrong}' is "
            f"{tuple(given.get(wrong, ())) or 'missing'}, "
            f"expected {tuple(expected.get(wrong, ())) or 'nothing'}."
        )
    for module in headwise_modules(model):
        if module.retrieval_heads:
            for name, parameter in module.indexer.named_parameters():
                parameter.data.copy_(weights[f"layers.{module.layer_idx}.indexer.{name}"])


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
        [], convertible_layers(config), config.num_attention_heads, config.num_key_value_heads
    )


def check_head_map(config: Any, head_map: HeadMap) -> None:
    """Refuses a head map that does not fit a transformers configuration.

    Raises:
        RTPurboError: it has another shape, or leaves out other layers than those with windows.
    """
    shape = (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads)
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

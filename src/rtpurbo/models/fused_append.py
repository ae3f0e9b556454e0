"""Fused KV append: one kernel for QK-norm, RoPE, index projection and cache write of a decode step.

It replaces about fifty kernels of the attention module of a listed family and of
`HeadwiseLayer.append`, and needs a cache with fixed slots and one new token for each sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from rtpurbo.devices import has_triton
from rtpurbo.models.arguments import CACHE_NAME
from rtpurbo.models.cache_layers import HeadwiseLayer
from rtpurbo.models.families import FAMILIES
from rtpurbo.models.sparse_layer import SparseAttention, sparse_layer_of
from rtpurbo.ops import KeyValueStates
from rtpurbo.ops.api import HALF, interprets_kernels


class FusedAppendForward:
    """Forward of an attention module of a listed family, with the fused KV append where it is supported.

    An object rather than a closure, so that a copy of the module has its own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Runs the forward; arguments and results are those of the module's class."""
        layer = sparse_layer_of(self.module)
        assert layer is not None
        hidden_states = kwargs.get("hidden_states")
        cache = kwargs.get(CACHE_NAME)
        if isinstance(cache, Cache) and hidden_states is not None:
            past = cache.layers[layer.layer_idx]
            if isinstance(past, HeadwiseLayer) and supports_fused_append(
                layer, hidden_states, past
            ):
                return _decode_step(
                    layer, hidden_states, kwargs.get("position_embeddings"), past
                ), None
        return type(self.module).forward(self.module, *args, **kwargs)


def attach_fused_append(layer: SparseAttention) -> None:
    """Replaces the forward of an attention module of a listed family by `FusedAppendForward`.

    A forward that is replaced already, as by accelerate to load weights, is kept.
    """
    module: Any = layer.module
    if module.config.model_type in FAMILIES and "forward" not in vars(module):
        module.forward = FusedAppendForward(module)


def detach_fused_append(module: nn.Module) -> None:
    """Undoes `attach_fused_append`."""
    if isinstance(vars(module).get("forward"), FusedAppendForward):
        del module.forward


def _decode_step(
    layer: SparseAttention, hidden_states: Tensor, embeddings: Any, past: HeadwiseLayer
) -> Tensor:
    past.check_rule(layer.rule)
    layer.embeddings = None
    queries, keys, values = project(layer, hidden_states)
    appended = append_fused(layer, queries, keys, values, embeddings, past)
    assert past.slots.query_positions is not None
    output = layer.attend(past.slots.query_positions.to(queries.device), *appended)
    module: Any = layer.module
    return module.o_proj(output.transpose(1, 2).flatten(2))


def project(layer: SparseAttention, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, [batch, heads, length, head_dim], before a norm of each head."""
    module: Any = layer.module
    family = FAMILIES[module.config.model_type]
    if family.fused_projection:
        sizes = [layer.num_attention_heads, layer.num_key_value_heads, layer.num_key_value_heads]
        fused = module.qkv_proj(hidden_states)
        query, key, value = fused.split([heads * layer.head_dim for heads in sizes], -1)
    else:
        projections = module.q_proj, module.k_proj, module.v_proj
        query, key, value = (projection(hidden_states) for projection in projections)
    if family.query_key_norm == "whole":
        query, key = module.q_norm(query), module.k_norm(key)
    query, key, value = (
        part.unflatten(-1, (-1, layer.head_dim)).transpose(1, 2) for part in (query, key, value)
    )
    return query, key, value


def supports_fused_append(
    layer: SparseAttention, hidden_states: Tensor, past: HeadwiseLayer
) -> bool:
    """True if the fused kernel supports this call, after `begin_forward`: no observers and no gradients.

    `hidden_states` are [batch, q_len, hidden_size].
    """
    return (
        past.slots.newest is not None
        and hidden_states.shape[1] == 1
        and layer.observer is None
        and not layer.dense
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(hidden_states.device.type)
        and _has_kernels(layer.backend, hidden_states)
        and _knows_norms(layer.module, hidden_states.dtype)
        and bool(layer.retrieval_heads) == (past.index_keys.storage is not None)
        and _has_slots(past, hidden_states)
    )


def _has_kernels(backend: str, states: Tensor) -> bool:
    """True if kernels run on these states; see `rtpurbo.ops.api.chosen_backend`."""
    if backend == "auto":
        return states.is_cuda and states.dtype in HALF and has_triton()
    can_run = states.is_cuda or interprets_kernels()
    return (
        backend == "triton" and can_run and states.dtype in (*HALF, torch.float32) and has_triton()
    )


def _knows_norms(module: Any, dtype: torch.dtype) -> bool:
    """True if the module has no norms of heads, or unwrapped ones of its family."""
    if FAMILIES[module.config.model_type].query_key_norm != "per_head":
        return True
    norms: list[Any] = [module.q_norm, module.k_norm]
    return all(
        type(norm).__name__.endswith("RMSNorm")
        and norm.weight.dtype == dtype
        and not (norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm))
        for norm in norms
    )


def _has_slots(past: HeadwiseLayer, states: Tensor) -> bool:
    """True if the storages have enough slots for the sequences; the kernel does not check."""
    slots: Any = past.slots
    batch, device = states.shape[0], states.device
    capacity, ring_size = (part.positions.shape[1] for part in (slots, slots.ring))
    full = [(part.storage, capacity) for part in (past.full_keys, past.full_values)]
    held: list[Any] = [*full, (past.ring.keys, ring_size), (past.ring.values, ring_size)]
    if any(storage is None or storage.dtype != states.dtype for storage, _ in held):
        return False
    if past.index_keys.storage is not None:  # in a dtype of its own
        held.append((past.index_keys.storage, capacity))
    new_slots = slots.ring.new_slots
    return (
        slots.newest.device == new_slots.device == device
        and new_slots.shape == (batch, 1)
        and all(
            storage.device == device and storage.shape[::2] == (batch, num_slots)
            for storage, num_slots in held
        )
    )


def append_fused(
    layer: SparseAttention,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    past: HeadwiseLayer,
) -> tuple[Tensor, Tensor | None, KeyValueStates, KeyValueStates]:
    """Writes one new token of each sequence into the cache, where `supports_fused_append` holds.

    Parameters are read in place, so that a captured step sees weights that are trained or loaded later. Queries, keys
    and values are those of `project`; cosines and sines [batch or 1, 1, rotary_dim] each.

    Returns:
        Queries after RoPE, index queries or None, states of full KV heads and of windowed ones.
    """
    # Triton may not be installed.
    from rtpurbo.ops.triton.decode.fused_append import (
        AppendSlots,
        HeadNorm,
        IndexProjection,
        fused_kv_append,
    )

    module: Any = layer.module
    family = FAMILIES[module.config.model_type]
    norm = projection = None
    if family.query_key_norm == "per_head":
        weights = module.q_norm.weight, module.k_norm.weight
        epsilon = getattr(module.q_norm, "variance_epsilon", None)
        epsilon = module.q_norm.eps if epsilon is None else epsilon
        norm = HeadNorm(*weights, epsilon, family.unit_offset_norms)
    if layer.retrieval_heads:
        projection = IndexProjection(
            layer.indexer.query_weight,
            layer.indexer.key_weight,
            layer.indexer.feature_dimensions,
            layer.indexer.settings.index_space != "pre_rope",
        )
    slots: Any = past.slots
    held: Any = past
    layout = layer.layout(queries.device)
    queries, index_queries = fused_kv_append(
        queries,
        keys,
        values,
        position_embeddings if getattr(module, "use_rope", True) else None,
        norm,
        projection,
        layout,
        AppendSlots(
            slots.newest,
            slots.ring.new_slots,
            held.full_keys.storage,
            held.full_values.storage,
            held.ring.keys,
            held.ring.values,
            held.index_keys.storage,
        ),
    )
    return queries, index_queries, *past.count_appended(layout)

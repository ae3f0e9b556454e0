"""One new token a sequence enters fixed slots through one kernel instead of some fifty.

What it computes is what `HeadwiseAttention` otherwise does in PyTorch: QK-norm of each head, rotary
embedding, index states, and `HeadwiseLayer.append`.
"""

from __future__ import annotations

import os
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rtpurbo.devices import has_triton
from rtpurbo.models.cache_layers import HeadwiseLayer
from rtpurbo.models.families import Family
from rtpurbo.models.indexer import TokenIndexer
from rtpurbo.ops import HeadLayout, KeyValueStates

HALF = (torch.float16, torch.bfloat16)


class EnteredLayer(Protocol):
    """What is read of a layer, a `HeadwiseAttention`."""

    family: Family
    q_norm: nn.Module
    k_norm: nn.Module
    indexer: TokenIndexer
    retrieval_heads: list[int]
    uses_rotary: bool
    backend: str
    observer: Any

    def layout(self, device: torch.device) -> HeadLayout:
        """The layer's heads as index tensors on a device."""


def enters_by_kernel(module: EnteredLayer, queries: Tensor, past: HeadwiseLayer | None) -> bool:
    """Whether `enter` serves this call: the kernel suits it, and nobody watches or wants gradients.

    Args:
        module: the layer.
        queries: [batch, num_attention_heads, q_len, head_dim], as projected.
        past: the layer's cache, which was told of the tokens.
    """
    return (
        past is not None
        and past.slots.newest is not None
        and queries.shape[2] == 1
        and module.observer is None
        and not torch.is_grad_enabled()
        and _has_kernels(module.backend, queries)
        and _knows_norms(module, queries.dtype)
        and bool(module.retrieval_heads) == (past.index_keys.storage is not None)
        and _has_slots(past, queries)
    )


def _has_kernels(backend: str, queries: Tensor) -> bool:
    """As `chosen_backend` has it."""
    if backend == "auto":
        return queries.is_cuda and queries.dtype in HALF and has_triton()
    can_run = queries.is_cuda or bool(os.environ.get("TRITON_INTERPRET"))
    return (
        backend == "triton" and can_run and queries.dtype in (*HALF, torch.float32) and has_triton()
    )


def _knows_norms(module: EnteredLayer, dtype: torch.dtype) -> bool:
    """Whether norms of heads, if any, are the family's own, with nothing put around them."""
    if module.family.query_key_norm != "per_head":
        return True
    norms: list[Any] = [module.q_norm, module.k_norm]
    return all(
        type(norm).__name__.endswith("RMSNorm")
        and norm.weight.dtype == dtype
        and not (norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm))
        for norm in norms
    )


def _has_slots(past: HeadwiseLayer, queries: Tensor) -> bool:
    """Whether storages have the slots told, here and for so many sequences: a kernel writes unchecked."""
    slots, ring = past.slots, past.slots.ring
    assert slots.newest is not None
    assert ring.entering is not None
    assert ring.positions is not None
    held = [
        (past.full_keys.storage, slots.capacity),
        (past.full_values.storage, slots.capacity),
        (past.ring.keys, ring.positions.shape[1]),
        (past.ring.values, ring.positions.shape[1]),
    ]
    if any(storage is None or storage.dtype != queries.dtype for storage, _ in held):
        return False
    if past.index_keys.storage is not None:  # in a dtype of its own
        held.append((past.index_keys.storage, slots.capacity))
    batch, device = queries.shape[0], queries.device
    return (
        slots.newest.device == ring.entering.device == device
        and ring.entering.shape == (batch, 1)
        and all(
            storage is not None
            and storage.device == device
            and storage.shape[::2] == (batch, num_slots)
            for storage, num_slots in held
        )
    )


def enter(
    module: EnteredLayer,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None,
    past: HeadwiseLayer,
) -> tuple[Tensor, Tensor | None, KeyValueStates, KeyValueStates]:
    """Writes one new token a sequence into the cache, where `enters_by_kernel`.

    Parameters are read where they lie: a captured step follows whoever trains or loads them.

    Args:
        module: the layer.
        queries: [batch, num_attention_heads, 1, head_dim], as projected.
        keys: [batch, num_key_value_heads, 1, head_dim], likewise.
        values: likewise.
        position_embeddings: cosines and sines, [batch or 1, 1, rotary_dim] each.
        past: the layer's cache.

    Returns:
        Queries after RoPE, index queries or None, states of full KV heads and of bounded ones.
    """
    # Without Triton there is none of this.
    from rtpurbo.ops.triton.decode.enter import FixedSlots, HeadNorm, IndexProjection, enter_token

    norm = projection = None
    if module.family.query_key_norm == "per_head":
        query_norm: Any = module.q_norm
        key_norm: Any = module.k_norm
        epsilon = getattr(query_norm, "variance_epsilon", None)
        norm = HeadNorm(
            query_norm.weight,
            key_norm.weight,
            query_norm.eps if epsilon is None else epsilon,
            module.family.unit_offset_norms,
        )
    if module.retrieval_heads:
        projection = IndexProjection(
            module.indexer.query_weight,
            module.indexer.key_weight,
            module.indexer.feature_dimensions,
            module.indexer.settings.index_space != "pre_rope",
        )
    slots, ring = past.slots, past.ring
    assert slots.newest is not None
    assert slots.ring.entering is not None
    assert past.full_keys.storage is not None
    assert past.full_values.storage is not None
    assert ring.keys is not None
    assert ring.values is not None
    layout = module.layout(queries.device)
    entered, index_queries = enter_token(
        queries,
        keys,
        values,
        position_embeddings if module.uses_rotary else None,
        norm,
        projection,
        layout,
        FixedSlots(
            slots.newest,
            slots.ring.entering,
            past.full_keys.storage,
            past.full_values.storage,
            ring.keys,
            ring.values,
            past.index_keys.storage,
        ),
    )
    return entered, index_queries, *past.count_entered(layout)

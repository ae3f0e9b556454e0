"""Fused KV append of a decode step: QK-norm, RoPE, index projection and cache writes in one kernel.

Runs before the kernels of `attention` and replaces these modules: RMSNorm of each head, rotary embedding, the
projections of the indexer, and the copies into the token's slots of a static cache.

B sequences, H query heads, F full and K - F windowed KV heads, R retrieval heads; D head_dim, I index_dim,
N dimensions of a head that the indexer projects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from rtpurbo.ops.states import HeadLayout
from rtpurbo.ops.triton.decode.fused_append_kernel import fused_append_kernel

# Weights of the indexer that one warp multiplies at a time.
INDEX_ELEMENTS = 2048


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm of query and key heads (QK-norm).

    Attributes:
        query_weight: [D], in the dtype of the states.
        key_weight: [D], same dtype.
        epsilon: added to the mean of squares.
        unit_offset: the factor is 1 + weight in fp32 (Gemma); otherwise weight in the states' dtype.
    """

    query_weight: Tensor
    key_weight: Tensor
    epsilon: float
    unit_offset: bool = False


@dataclass(frozen=True)
class IndexProjection:
    """Projection of retrieval heads to index states.

    Attributes:
        query_weight: [R, I, N].
        key_weight: [R, I, N], or [F, I, N] if index keys are shared per KV head.
        feature_dimensions: int64 [N], projected dimensions of a head.
        rotated: project states after RoPE, not before.
    """

    query_weight: Tensor
    key_weight: Tensor
    feature_dimensions: Tensor
    rotated: bool


@dataclass(frozen=True)
class AppendSlots:
    """Static cache and the slots that the token is written to.

    Attributes:
        full_slot: int64 [1], slot in the full KV heads.
        windowed_slots: int64 [B, 1], slots in the ring buffers of the windowed KV heads.
        full_keys: [B, F, capacity, D].
        full_values: same shape.
        windowed_keys: [B, K - F, slots, D].
        windowed_values: same shape.
        index_keys: [B, R or F, capacity, I], in any floating dtype; None without retrieval heads.
    """

    full_slot: Tensor
    windowed_slots: Tensor
    full_keys: Tensor
    full_values: Tensor
    windowed_keys: Tensor
    windowed_values: Tensor
    index_keys: Tensor | None


def fused_kv_append(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    norm: HeadNorm | None,
    projection: IndexProjection | None,
    layout: HeadLayout,
    slots: AppendSlots,
) -> tuple[Tensor, Tensor | None]:
    """Appends one token per sequence to a static cache and prepares its query.

    Args:
        queries: [B, H, 1, D] as projected, before norm and RoPE; may be a view of a fused projection.
        keys: [B, K, 1, D], as projected.
        values: [B, K, 1, D].
        rotary: cosines and sines, [B or 1, 1, rotary_dim] each; None without RoPE.
        norm: QK-norm; None if there is none or if it was applied before.
        projection: of index states; None without retrieval heads.
        layout: query and KV heads by kind.
        slots: cache and slots to write.

    Returns:
        Queries [B, H, 1, D] after norm and RoPE, and index queries [B, R, 1, I] (float16 for bfloat16 states)
        or None.
    """
    batch, num_heads, _, head_dim = queries.shape
    num_full, num_windowed = (
        layout.full_key_value_heads.numel(),
        layout.windowed_key_value_heads.numel(),
    )
    num_retrieval = num_index_keys = 0
    if projection is not None:
        num_retrieval, num_index_keys = len(layout.retrieval), projection.key_weight.shape[0]
    rotated = queries.new_empty(batch, num_heads, 1, head_dim)
    index_queries = None
    index_dim = num_features = 1
    if projection is not None:
        index_dim, num_features = projection.query_weight.shape[1:]
        dtype = torch.float16 if queries.dtype == torch.bfloat16 else queries.dtype
        index_queries = queries.new_empty(batch, num_retrieval, 1, index_dim, dtype=dtype)
    cosines = sines = None
    rotary_dim = rotary_stride = 0
    if rotary is not None:
        cosines, sines = (part.contiguous() for part in rotary)
        rotary_dim = cosines.shape[-1]
        rotary_stride = rotary_dim if cosines.shape[0] > 1 else 0
    index_width = triton.next_power_of_2(index_dim)
    feature_width = triton.next_power_of_2(num_features)
    index_strides = (0, 0, 0) if slots.index_keys is None else slots.index_keys.stride()[:3]
    with torch.cuda.device_of(queries):
        programs = num_heads + num_full + num_windowed + num_retrieval + num_index_keys
        fused_append_kernel[(programs, batch)](
            queries,
            queries.stride()[:2],
            keys,
            keys.stride()[:2],
            values,
            values.stride()[:2],
            None if norm is None else norm.query_weight,
            None if norm is None else norm.key_weight,
            0.0 if norm is None else norm.epsilon,
            cosines,
            sines,
            rotary_stride,
            None if projection is None else projection.feature_dimensions,
            None if projection is None else projection.query_weight.contiguous(),
            None if projection is None else projection.key_weight.contiguous(),
            slots.full_slot,
            slots.windowed_slots,
            slots.windowed_slots.stride(0),
            layout.full_key_value_heads,
            layout.windowed_key_value_heads,
            layout.retrieval.heads,
            rotated,
            index_queries,
            slots.full_keys,
            slots.full_keys.stride()[:3],
            slots.full_values,
            slots.full_values.stride()[:3],
            slots.windowed_keys,
            slots.windowed_keys.stride()[:3],
            slots.windowed_values,
            slots.windowed_values.stride()[:3],
            None if projection is None else slots.index_keys,
            index_strides,
            num_heads,
            num_full,
            num_windowed,
            num_retrieval,
            GROUP=num_heads // (num_full + num_windowed),
            HEAD_DIM=head_dim,
            WIDTH=triton.next_power_of_2(head_dim),
            ROTARY_DIM=rotary_dim,
            INDEX_ROTARY_DIM=rotary_dim if projection is not None and projection.rotated else 0,
            UNIT_OFFSET=norm is not None and norm.unit_offset,
            NUM_FEATURES=num_features,
            FEATURE_WIDTH=feature_width,
            INDEX_DIM=index_dim,
            INDEX_WIDTH=index_width,
            INDEX_TILE=max(1, min(index_width, INDEX_ELEMENTS // feature_width)),
            SHARED_KEYS=num_index_keys != num_retrieval,
            num_warps=1,
        )
    return rotated, index_queries

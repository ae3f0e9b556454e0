"""Fused KV append: QK-norm, RoPE, index projection and cache writes in one kernel.

Runs before the kernels of `attention` and replaces these modules: RMSNorm of each head, rotary embedding, the
projections of the indexer, and the copies into the token's slots of a static or a paged cache.

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
from rtpurbo.ops.triton.decode.workspace import strides

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
        full_slots: int64 [1], slot in the full KV heads.
        windowed_slots: int64 [B, 1], slots in the ring buffers of the windowed KV heads.
        full_keys: [B, F, capacity, D].
        full_values: same shape.
        windowed_keys: [B, K - F, slots, D].
        windowed_values: same shape.
        index_keys: [B, R or F, capacity, I], in any floating dtype; None without retrieval heads.
    """

    full_slots: Tensor
    windowed_slots: Tensor
    full_keys: Tensor
    full_values: Tensor
    windowed_keys: Tensor
    windowed_values: Tensor
    index_keys: Tensor | None


@dataclass(frozen=True)
class PagedSlots(AppendSlots):
    """Paged caches and the slots that T tokens are written to.

    Slots are int64 [T], page times page size plus place in the page, and negative if the token is not stored. Caches
    have pages in place of B and the size of a page in place of slots; all keys and values are in the dtype of the
    states, or float8_e4m3fn.

    Attributes, beside those of `AppendSlots`:
        lengths: int32 [T], tokens of the sequences, each of which has one token here; None if all index queries
            are needed.
        prompt_lengths: int32 [T]; index queries of sequences that are no longer than this are zeros.
        key_scale: a key is the stored float8 value times this scale.
        value_scale: same for values.
    """

    lengths: Tensor | None = None
    prompt_lengths: Tensor | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0


@dataclass(frozen=True)
class RotaryTable:
    """Cosines and sines of all positions.

    Attributes:
        table: [positions, rotary_dim], cosines of half of the rotated dimensions, then their sines.
        positions: int [T], position of each token.
    """

    table: Tensor
    positions: Tensor


def fused_kv_append(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rotary: tuple[Tensor, Tensor] | RotaryTable | None,
    norm: HeadNorm | None,
    projection: IndexProjection | None,
    layout: HeadLayout,
    slots: AppendSlots,
) -> tuple[Tensor, Tensor | None]:
    """Appends one token per sequence to a static cache, or tokens to a paged one, and prepares their queries.

    Args:
        queries: [B, H, 1, D] as projected, before norm and RoPE; may be a view of a fused projection.
        keys: [B, K, 1, D], as projected.
        values: [B, K, 1, D].
        rotary: cosines and sines, [B or 1, 1, rotary_dim] each, or a table of them with pages; None without RoPE.
        norm: QK-norm; None if there is none or if it was applied before.
        projection: of index states; None without retrieval heads.
        layout: query and KV heads by kind.
        slots: cache and slots to write. With pages, B is the number of tokens, of any sequences.

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
    cosines = sines = positions = None
    rotary_dim = rotary_stride = 0
    if isinstance(rotary, RotaryTable):
        cosines, sines = rotary.table.chunk(2, -1)
        positions = rotary.positions
        rotary_dim, rotary_stride = rotary.table.shape[-1], rotary.table.stride(0)
    elif rotary is not None:
        cosines, sines = (part.contiguous() for part in rotary)
        rotary_dim = cosines.shape[-1]
        rotary_stride = rotary_dim if cosines.shape[0] > 1 else 0
    index_width = triton.next_power_of_2(index_dim)
    feature_width = triton.next_power_of_2(num_features)
    programs = num_heads + num_full + num_windowed + num_retrieval + num_index_keys
    lengths = prompt_lengths = key_factor = value_factor = None
    if isinstance(slots, PagedSlots):
        grid, windowed_slot_stride = (batch, programs), 1
        full_page, windowed_page = slots.full_keys.shape[2], slots.windowed_keys.shape[2]
        lengths, prompt_lengths = slots.lengths, slots.prompt_lengths
        if slots.full_keys.dtype == torch.float8_e4m3fn:
            key_factor, value_factor = 1 / slots.key_scale, 1 / slots.value_scale
    else:
        grid, windowed_slot_stride = (programs, batch), slots.windowed_slots.stride(0)
        full_page = windowed_page = 0
    with torch.cuda.device_of(queries):
        fused_append_kernel[grid](
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
            positions,
            None if projection is None else projection.feature_dimensions,
            None if projection is None else projection.query_weight.contiguous(),
            None if projection is None else projection.key_weight.contiguous(),
            slots.full_slots,
            slots.windowed_slots,
            windowed_slot_stride,
            lengths,
            prompt_lengths,
            layout.full_key_value_heads,
            layout.windowed_key_value_heads,
            layout.retrieval.heads,
            rotated,
            index_queries,
            slots.full_keys,
            strides(slots.full_keys),
            slots.full_values,
            strides(slots.full_values),
            slots.windowed_keys,
            strides(slots.windowed_keys),
            slots.windowed_values,
            strides(slots.windowed_values),
            None if projection is None else slots.index_keys,
            strides(slots.index_keys),
            key_factor,
            value_factor,
            num_heads,
            num_full,
            num_windowed,
            num_retrieval,
            GROUP=num_heads // (num_full + num_windowed),
            HEAD_DIM=head_dim,
            WIDTH=triton.next_power_of_2(head_dim),
            ROTARY_DIM=rotary_dim,
            INDEX_ROTARY_DIM=rotary_dim if projection is not None and projection.rotated else 0,
            HALF_TABLES=positions is not None,
            UNIT_OFFSET=norm is not None and norm.unit_offset,
            NUM_FEATURES=num_features,
            FEATURE_WIDTH=feature_width,
            INDEX_DIM=index_dim,
            INDEX_WIDTH=index_width,
            INDEX_TILE=max(1, min(index_width, INDEX_ELEMENTS // feature_width)),
            SHARED_KEYS=num_index_keys != num_retrieval,
            FULL_PAGE=full_page,
            WINDOWED_PAGE=windowed_page,
            num_warps=1,
        )
    return rotated, index_queries

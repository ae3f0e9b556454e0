"""A token enters a cache of fixed slots: norm, rotation, index states and every write, in one launch.

It comes before the launches of `attention`. Its meaning is that of the modules it replaces: RMSNorm of
each head, rotary embedding, the projections of the indexer, and copies into the slots of the token.

B sequences, H query heads, F full and K - F bounded KV heads, R retrieval heads; D head_dim, I index_dim,
N dimensions of a head that the indexer projects.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rtpurbo.ops.states import HeadLayout

# Weights of the indexer that one warp multiplies at a time.
INDEX_ELEMENTS = 2048


@dataclass(frozen=True)
class HeadNorm:
    """RMSNorm of each head.

    Attributes:
        query_weight: [D], in the dtype of the states.
        key_weight: likewise.
        epsilon: what is added to the mean of squares.
        unit_offset: the factor is 1 + weight, in fp32; else it is the weight, in the states' dtype.
    """

    query_weight: Tensor
    key_weight: Tensor
    epsilon: float
    unit_offset: bool = False


@dataclass(frozen=True)
class IndexProjection:
    """How index states come from the states of retrieval heads.

    Attributes:
        query_weight: [R, I, N].
        key_weight: [R, I, N], or [F, I, N] if the retrieval heads of a KV head share their index keys.
        feature_dimensions: int64 [N], the dimensions of a head that are projected.
        rotated: they are taken after the rotation, not before it.
    """

    query_weight: Tensor
    key_weight: Tensor
    feature_dimensions: Tensor
    rotated: bool


@dataclass(frozen=True)
class FixedSlots:
    """Where the token goes.

    Attributes:
        newest: int64 [1], its slot in full KV heads.
        entering: int64 [B, 1], its slots in bounded ones.
        full_keys: [B, F, capacity, D].
        full_values: likewise.
        ring_keys: [B, K - F, slots, D].
        ring_values: likewise.
        index_keys: [B, R or F, capacity, I], in any floating dtype; None if nothing retrieves.
    """

    newest: Tensor
    entering: Tensor
    full_keys: Tensor
    full_values: Tensor
    ring_keys: Tensor
    ring_values: Tensor
    index_keys: Tensor | None


@triton.jit
def _normed(row, dims, valid, norm_weight, factor, UNIT_OFFSET: tl.constexpr):
    """Some elements of a head, times `factor` and weight if there is one; rounded as the model does."""
    states = tl.load(row + dims, mask=valid, other=0.0).to(tl.float32)
    if norm_weight is not None:
        weight = tl.load(norm_weight + dims, mask=valid, other=0.0).to(tl.float32)
        states *= factor
        if UNIT_OFFSET:
            states *= 1.0 + weight
        else:
            states = states.to(row.dtype.element_ty).to(tl.float32) * weight
    return states.to(row.dtype.element_ty).to(tl.float32)


@triton.jit
def _entering_states(
    row,
    dims,
    valid,
    norm_weight,
    epsilon,
    cosines,
    sines,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
    """Elements `dims` of the head at `row`, normed and rotated, in its dtype."""
    factor = 1.0
    if norm_weight is not None:
        everything = tl.arange(0, WIDTH)
        head = tl.load(row + everything, mask=everything < HEAD_DIM, other=0.0).to(tl.float32)
        factor = tl.rsqrt(tl.sum(head * head, 0) / HEAD_DIM + epsilon)
    states = _normed(row, dims, valid, norm_weight, factor, UNIT_OFFSET)
    if ROTARY_DIM > 0:
        turned = valid & (dims < ROTARY_DIM)
        is_first = dims < ROTARY_DIM // 2
        partner_dims = tl.where(is_first, dims + ROTARY_DIM // 2, dims - ROTARY_DIM // 2)
        partners = _normed(row, partner_dims, turned, norm_weight, factor, UNIT_OFFSET)
        cosine = tl.load(cosines + dims, mask=turned, other=1.0).to(tl.float32)
        sine = tl.load(sines + dims, mask=turned, other=0.0).to(tl.float32)
        states = states * cosine + tl.where(is_first, -partners, partners) * sine
    return states.to(row.dtype.element_ty)


@triton.jit
def _project(
    row,
    norm_weight,
    epsilon,
    cosines,
    sines,
    feature_dimensions,
    weight,
    target,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    FEATURE_WIDTH: tl.constexpr,
    INDEX_DIM: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    INDEX_TILE: tl.constexpr,
):
    """Index states [I] of the head at `row`, by `weight` [I, N], to `target`."""
    features = tl.arange(0, FEATURE_WIDTH)
    valid = features < NUM_FEATURES
    dims = tl.load(feature_dimensions + features, mask=valid, other=0).to(tl.int32)
    states = _entering_states(
        row, dims, valid, norm_weight, epsilon, cosines, sines,
        HEAD_DIM, WIDTH, ROTARY_DIM, UNIT_OFFSET,
    ).to(tl.float32)  # fmt: skip
    for start in range(0, INDEX_WIDTH, INDEX_TILE):
        index_dims = start + tl.arange(0, INDEX_TILE)
        in_row = index_dims < INDEX_DIM
        factors = tl.load(
            weight + index_dims[:, None] * NUM_FEATURES + features[None, :],
            mask=in_row[:, None] & valid[None, :],
            other=0.0,
        )
        factors = factors.to(row.dtype.element_ty).to(tl.float32)
        products = tl.sum(factors * states[None, :], 1)
        tl.store(target + index_dims, products.to(target.dtype.element_ty), mask=in_row)


# Sizes that a kernel is not compiled for anew: not even for 1, of which the compiler makes a constant.
SIZES = ["entering_stride", "rotary_stride", "num_heads", "num_full", "num_ring", "num_retrieval"]


@triton.jit(do_not_specialize=SIZES)
def enter_kernel(
    queries,
    query_strides,
    keys,
    key_strides,
    values,
    value_strides,
    query_norm,
    key_norm,
    epsilon,
    cosines,
    sines,
    rotary_stride,
    feature_dimensions,
    index_query_weight,
    index_key_weight,
    newest,
    entering,
    entering_stride,
    full_heads,
    ring_heads,
    retrieval_heads,
    entered_queries,
    index_queries,
    full_keys,
    full_key_strides,
    full_values,
    full_value_strides,
    ring_keys,
    ring_key_strides,
    ring_values,
    ring_value_strides,
    index_keys,
    index_key_strides,
    num_heads,
    num_full,
    num_ring,
    num_retrieval,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INDEX_ROTARY_DIM: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    FEATURE_WIDTH: tl.constexpr,
    INDEX_DIM: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    INDEX_TILE: tl.constexpr,
    SHARED_KEYS: tl.constexpr,
):
    """Programs (query head), (full KV head), (bounded KV head), (index query), (index key); sequences.

    A head is a row of its own for each, so that none waits for another. Writes `entered_queries`
    [B, H, D], `index_queries` [B, R, I] and one slot of every storage.
    """
    program = tl.program_id(0)
    sequence = tl.program_id(1)
    num_key_value_heads = num_full + num_ring
    queries += sequence.to(tl.int64) * query_strides[0]
    keys += sequence.to(tl.int64) * key_strides[0]
    values += sequence.to(tl.int64) * value_strides[0]
    if ROTARY_DIM > 0:
        cosines += sequence * rotary_stride
        sines += sequence * rotary_stride
    dims = tl.arange(0, WIDTH)
    valid = dims < HEAD_DIM
    if program < num_heads:
        states = _entering_states(
            queries + program * query_strides[1], dims, valid, query_norm, epsilon, cosines, sines,
            HEAD_DIM, WIDTH, ROTARY_DIM, UNIT_OFFSET,
        )  # fmt: skip
        row = sequence.to(tl.int64) * num_heads + program
        tl.store(entered_queries + row * HEAD_DIM + dims, states, mask=valid)
    elif program < num_heads + num_key_value_heads:
        place = (program - num_heads).to(tl.int64)
        if place < num_full:
            head = tl.load(full_heads + place)
            slot = tl.load(newest)
            key_target = full_keys + sequence.to(tl.int64) * full_key_strides[0]
            key_target += place * full_key_strides[1] + slot * full_key_strides[2]
            value_target = full_values + sequence.to(tl.int64) * full_value_strides[0]
            value_target += place * full_value_strides[1] + slot * full_value_strides[2]
        else:
            place -= num_full
            head = tl.load(ring_heads + place)
            slot = tl.load(entering + sequence * entering_stride)
            key_target = ring_keys + sequence.to(tl.int64) * ring_key_strides[0]
            key_target += place * ring_key_strides[1] + slot * ring_key_strides[2]
            value_target = ring_values + sequence.to(tl.int64) * ring_value_strides[0]
            value_target += place * ring_value_strides[1] + slot * ring_value_strides[2]
        value = tl.load(values + head * value_strides[1] + dims, mask=valid, other=0.0)
        tl.store(value_target + dims, value, mask=valid)
        key = _entering_states(
            keys + head * key_strides[1], dims, valid, key_norm, epsilon, cosines, sines,
            HEAD_DIM, WIDTH, ROTARY_DIM, UNIT_OFFSET,
        )  # fmt: skip
        tl.store(key_target + dims, key, mask=valid)
    elif index_keys is not None:
        rank = program - num_heads - num_key_value_heads
        if rank < num_retrieval:
            head = tl.load(retrieval_heads + rank)
            row = sequence.to(tl.int64) * num_retrieval + rank
            _project(
                queries + head * query_strides[1], query_norm, epsilon, cosines, sines,
                feature_dimensions, index_query_weight + rank * INDEX_DIM * NUM_FEATURES,
                index_queries + row * INDEX_DIM,
                HEAD_DIM, WIDTH, INDEX_ROTARY_DIM, UNIT_OFFSET,
                NUM_FEATURES, FEATURE_WIDTH, INDEX_DIM, INDEX_WIDTH, INDEX_TILE,
            )  # fmt: skip
        else:
            rank -= num_retrieval
            head = (
                tl.load(full_heads + rank)
                if SHARED_KEYS
                else tl.load(retrieval_heads + rank) // GROUP
            )
            slot = tl.load(newest)
            target = index_keys + sequence.to(tl.int64) * index_key_strides[0]
            target += rank.to(tl.int64) * index_key_strides[1] + slot * index_key_strides[2]
            _project(
                keys + head * key_strides[1], key_norm, epsilon, cosines, sines,
                feature_dimensions, index_key_weight + rank * INDEX_DIM * NUM_FEATURES, target,
                HEAD_DIM, WIDTH, INDEX_ROTARY_DIM, UNIT_OFFSET,
                NUM_FEATURES, FEATURE_WIDTH, INDEX_DIM, INDEX_WIDTH, INDEX_TILE,
            )  # fmt: skip


def enter_token(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    norm: HeadNorm | None,
    projection: IndexProjection | None,
    layout: HeadLayout,
    slots: FixedSlots,
) -> tuple[Tensor, Tensor | None]:
    """Writes the key and value of one new token a sequence, and prepares its query.

    Args:
        queries: [B, H, 1, D] as projected, before norm and rotation; a view of a fused projection too.
        keys: [B, K, 1, D], likewise.
        values: [B, K, 1, D].
        rotary: cosines and sines, [B or 1, 1, rotary_dim] each; None without a rotation.
        norm: of queries and keys; None if there is none, or if it was applied before.
        projection: of index states; None if no head retrieves.
        layout: which heads are full, and which retrieve.
        slots: where the token goes.

    Returns:
        Queries [B, H, 1, D] after the rotation and index queries [B, R, 1, I], or None; the latter in
        float16 where states are in bfloat16.
    """
    batch, num_heads, _, head_dim = queries.shape
    num_full, num_ring = (
        layout.full_key_value_heads.numel(),
        layout.windowed_key_value_heads.numel(),
    )
    num_retrieval = num_index_keys = 0
    if projection is not None:
        num_retrieval, num_index_keys = len(layout.retrieval), projection.key_weight.shape[0]
    entered = queries.new_empty(batch, num_heads, 1, head_dim)
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
        programs = num_heads + num_full + num_ring + num_retrieval + num_index_keys
        enter_kernel[(programs, batch)](
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
            slots.newest,
            slots.entering,
            slots.entering.stride(0),
            layout.full_key_value_heads,
            layout.windowed_key_value_heads,
            layout.retrieval.heads,
            entered,
            index_queries,
            slots.full_keys,
            slots.full_keys.stride()[:3],
            slots.full_values,
            slots.full_values.stride()[:3],
            slots.ring_keys,
            slots.ring_keys.stride()[:3],
            slots.ring_values,
            slots.ring_values.stride()[:3],
            None if projection is None else slots.index_keys,
            index_strides,
            num_heads,
            num_full,
            num_ring,
            num_retrieval,
            GROUP=num_heads // (num_full + num_ring),
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
    return entered, index_queries

"""Kernel of the fused KV append: QK-norm, RoPE, index projection and cache writes of one token per sequence.

With pages, tokens take the place of sequences: each has slots of its own, so a chunk of a prompt is appended in
the same way as one token of each of many requests.

B sequences (or tokens), H query heads, F full and K - F windowed KV heads, R retrieval heads; D head_dim,
I index_dim, N dimensions of a head that the indexer projects.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOAT8_MAX = tl.constexpr(448.0)
"""Largest value of float8_e4m3fn; larger ones would become NaN."""


@triton.jit
def _normalize(states_ptr, dims, valid, norm_weight, factor, UNIT_OFFSET: tl.constexpr):
    """Elements `dims` of a head, times `factor` and the norm's weight, if any; rounded like the model."""
    states = tl.load(states_ptr + dims, mask=valid, other=0.0).to(tl.float32)
    if norm_weight is not None:
        weight = tl.load(norm_weight + dims, mask=valid, other=0.0).to(tl.float32)
        states *= factor
        if UNIT_OFFSET:
            states *= 1.0 + weight
        else:
            states = states.to(states_ptr.dtype.element_ty).to(tl.float32) * weight
    return states.to(states_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _norm_and_rotate(
    states_ptr,
    dims,
    valid,
    norm_weight,
    epsilon,
    cosines,
    sines,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HALF_TABLES: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
):
    """Elements `dims` of the head at `states_ptr` after norm and RoPE, in its dtype.

    With HALF_TABLES, cosines and sines of one half of the rotated dimensions are those of the other half too.
    """
    factor = 1.0
    if norm_weight is not None:
        everything = tl.arange(0, WIDTH)
        head = tl.load(states_ptr + everything, mask=everything < HEAD_DIM, other=0.0).to(
            tl.float32
        )
        factor = tl.rsqrt(tl.sum(head * head, 0) / HEAD_DIM + epsilon)
    states = _normalize(states_ptr, dims, valid, norm_weight, factor, UNIT_OFFSET)
    if ROTARY_DIM > 0:
        in_rotary = valid & (dims < ROTARY_DIM)
        is_first = dims < ROTARY_DIM // 2
        partner_dims = tl.where(is_first, dims + ROTARY_DIM // 2, dims - ROTARY_DIM // 2)
        partners = _normalize(states_ptr, partner_dims, in_rotary, norm_weight, factor, UNIT_OFFSET)
        if HALF_TABLES:
            angles = tl.where(is_first, dims, partner_dims)
            cosine = tl.load(cosines + angles, mask=in_rotary, other=1.0)
            sine = tl.load(sines + angles, mask=in_rotary, other=0.0)
            # Tables may be more precise than the states; models round angles to the states' dtype.
            cosine = cosine.to(states_ptr.dtype.element_ty).to(tl.float32)
            sine = sine.to(states_ptr.dtype.element_ty).to(tl.float32)
        else:
            cosine = tl.load(cosines + dims, mask=in_rotary, other=1.0).to(tl.float32)
            sine = tl.load(sines + dims, mask=in_rotary, other=0.0).to(tl.float32)
        states = states * cosine + tl.where(is_first, -partners, partners) * sine
    return states.to(states_ptr.dtype.element_ty)


@triton.jit
def _project(
    states_ptr,
    norm_weight,
    epsilon,
    cosines,
    sines,
    feature_dimensions,
    weight,
    factor,
    target,
    stored,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    HALF_TABLES: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    FEATURE_WIDTH: tl.constexpr,
    INDEX_DIM: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    INDEX_TILE: tl.constexpr,
):
    """Writes the index states [I] of the head at `states_ptr`, projected by `weight` [I, N], to `target`.

    They are multiplied by `factor` and written if `stored`, where these are not None.
    """
    features = tl.arange(0, FEATURE_WIDTH)
    valid = features < NUM_FEATURES
    dims = tl.load(feature_dimensions + features, mask=valid, other=0).to(tl.int32)
    states = _norm_and_rotate(
        states_ptr, dims, valid, norm_weight, epsilon, cosines, sines,
        HEAD_DIM, WIDTH, ROTARY_DIM, HALF_TABLES, UNIT_OFFSET,
    ).to(tl.float32)  # fmt: skip
    for start in range(0, INDEX_WIDTH, INDEX_TILE):
        index_dims = start + tl.arange(0, INDEX_TILE)
        in_index = index_dims < INDEX_DIM
        factors = tl.load(
            weight + index_dims[:, None] * NUM_FEATURES + features[None, :],
            mask=in_index[:, None] & valid[None, :],
            other=0.0,
        )
        factors = factors.to(states_ptr.dtype.element_ty).to(tl.float32)
        products = tl.sum(factors * states[None, :], 1)
        if factor is not None:
            products *= factor
        if stored is not None:
            in_index = index_dims < tl.where(stored, INDEX_DIM, 0)
        tl.store(target + index_dims, products.to(target.dtype.element_ty), mask=in_index)


@triton.jit
def _target(states, strides, sequence, head, slot, PAGE_SIZE: tl.constexpr):
    """Pointer to the slot of a head in a cache; to slot 0 if it is negative, with pages."""
    if PAGE_SIZE > 0:
        slot = tl.maximum(slot, 0)
        target = states + (slot // PAGE_SIZE) * strides[0]
        target += head * strides[1] + (slot % PAGE_SIZE) * strides[2]
    else:
        target = states + sequence.to(tl.int64) * strides[0]
        target += head * strides[1] + slot * strides[2]
    return target


@triton.jit
def _stored(states, factor, dtype: tl.constexpr):
    """States as they are stored in a cache of `dtype`: float8 if there is a factor, which they are multiplied by."""
    if factor is not None:
        states = tl.clamp(states.to(tl.float32) * factor, -FLOAT8_MAX, FLOAT8_MAX).to(dtype)
    return states


# Not specialised: a value of 1 or a multiple of 16 does not compile another kernel.
SIZES = [
    "windowed_slot_stride",
    "rotary_stride",
    "num_heads",
    "num_full",
    "num_windowed",
    "num_retrieval",
]


@triton.jit(do_not_specialize=SIZES)
def fused_append_kernel(
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
    positions,
    feature_dimensions,
    index_query_weight,
    index_key_weight,
    full_slots,
    windowed_slots,
    windowed_slot_stride,
    lengths,
    prompt_lengths,
    full_heads,
    windowed_heads,
    retrieval_heads,
    rotated_queries,
    index_queries,
    full_keys,
    full_key_strides,
    full_values,
    full_value_strides,
    windowed_keys,
    windowed_key_strides,
    windowed_values,
    windowed_value_strides,
    index_keys,
    index_key_strides,
    key_factor,
    value_factor,
    num_heads,
    num_full,
    num_windowed,
    num_retrieval,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INDEX_ROTARY_DIM: tl.constexpr,
    HALF_TABLES: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    NUM_FEATURES: tl.constexpr,
    FEATURE_WIDTH: tl.constexpr,
    INDEX_DIM: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    INDEX_TILE: tl.constexpr,
    SHARED_KEYS: tl.constexpr,
    FULL_PAGE: tl.constexpr,
    WINDOWED_PAGE: tl.constexpr,
):
    """Programs (query head), (full KV head), (windowed KV head), (index query), (index key); sequences.

    Index states are computed from the unprocessed heads again, so that no program depends on another. Writes
    `rotated_queries` [B, H, D], `index_queries` [B, R, I] and one slot of every cache.

    FULL_PAGE and WINDOWED_PAGE are tokens per page, 0 for a static cache. With pages, a token with a negative slot
    is not stored; `positions` [B], if given, select the rows of cosines and sines; and index queries of sequences
    whose `lengths` do not exceed their `prompt_lengths`, if given, are zeros.

    Keys and values are multiplied by `key_factor` and `value_factor` and stored as float8, where these are not None.
    """
    if FULL_PAGE + WINDOWED_PAGE > 0:
        # There may be more tokens than the second dimension of a grid allows.
        sequence = tl.program_id(0)
        program = tl.program_id(1)
    else:
        program = tl.program_id(0)
        sequence = tl.program_id(1)
    num_key_value_heads = num_full + num_windowed
    queries += sequence.to(tl.int64) * query_strides[0]
    keys += sequence.to(tl.int64) * key_strides[0]
    values += sequence.to(tl.int64) * value_strides[0]
    if ROTARY_DIM > 0:
        angle_row = sequence
        if positions is not None:
            angle_row = tl.load(positions + sequence).to(tl.int64)
        cosines += angle_row * rotary_stride
        sines += angle_row * rotary_stride
    dims = tl.arange(0, WIDTH)
    valid = dims < HEAD_DIM
    if program < num_heads:
        states = _norm_and_rotate(
            queries + program * query_strides[1], dims, valid, query_norm, epsilon, cosines, sines,
            HEAD_DIM, WIDTH, ROTARY_DIM, HALF_TABLES, UNIT_OFFSET,
        )  # fmt: skip
        head_index = sequence.to(tl.int64) * num_heads + program
        tl.store(rotated_queries + head_index * HEAD_DIM + dims, states, mask=valid)
    elif program < num_heads + num_key_value_heads:
        place = (program - num_heads).to(tl.int64)
        stored = valid
        if place < num_full:
            head = tl.load(full_heads + place)
            slot = tl.load(full_slots if FULL_PAGE == 0 else full_slots + sequence)
            if FULL_PAGE > 0:
                stored = dims < tl.where(slot >= 0, HEAD_DIM, 0)
            key_target = _target(full_keys, full_key_strides, sequence, place, slot, FULL_PAGE)
            value_target = _target(
                full_values, full_value_strides, sequence, place, slot, FULL_PAGE
            )
        else:
            place -= num_full
            head = tl.load(windowed_heads + place)
            slot = tl.load(windowed_slots + sequence * windowed_slot_stride)
            if WINDOWED_PAGE > 0:
                stored = dims < tl.where(slot >= 0, HEAD_DIM, 0)
            key_target = _target(
                windowed_keys, windowed_key_strides, sequence, place, slot, WINDOWED_PAGE
            )
            value_target = _target(
                windowed_values, windowed_value_strides, sequence, place, slot, WINDOWED_PAGE
            )
        value = tl.load(values + head * value_strides[1] + dims, mask=valid, other=0.0)
        value = _stored(value, value_factor, value_target.dtype.element_ty)
        tl.store(value_target + dims, value, mask=stored)
        key = _norm_and_rotate(
            keys + head * key_strides[1], dims, valid, key_norm, epsilon, cosines, sines,
            HEAD_DIM, WIDTH, ROTARY_DIM, HALF_TABLES, UNIT_OFFSET,
        )  # fmt: skip
        key = _stored(key, key_factor, key_target.dtype.element_ty)
        tl.store(key_target + dims, key, mask=stored)
    elif index_keys is not None:
        rank = program - num_heads - num_key_value_heads
        if rank < num_retrieval:
            head = tl.load(retrieval_heads + rank)
            head_index = sequence.to(tl.int64) * num_retrieval + rank
            factor = None
            if prompt_lengths is not None:
                selects = tl.load(lengths + sequence) > tl.load(prompt_lengths + sequence)
                factor = selects.to(tl.float32)
            _project(
                queries + head * query_strides[1], query_norm, epsilon, cosines, sines,
                feature_dimensions, index_query_weight + rank * INDEX_DIM * NUM_FEATURES,
                factor, index_queries + head_index * INDEX_DIM, None,
                HEAD_DIM, WIDTH, INDEX_ROTARY_DIM, HALF_TABLES, UNIT_OFFSET,
                NUM_FEATURES, FEATURE_WIDTH, INDEX_DIM, INDEX_WIDTH, INDEX_TILE,
            )  # fmt: skip
        else:
            rank -= num_retrieval
            head = (
                tl.load(full_heads + rank)
                if SHARED_KEYS
                else tl.load(retrieval_heads + rank) // GROUP
            )
            slot = tl.load(full_slots if FULL_PAGE == 0 else full_slots + sequence)
            stored = None
            if FULL_PAGE > 0:
                stored = slot >= 0
            target = _target(
                index_keys, index_key_strides, sequence, rank.to(tl.int64), slot, FULL_PAGE
            )
            _project(
                keys + head * key_strides[1], key_norm, epsilon, cosines, sines,
                feature_dimensions, index_key_weight + rank * INDEX_DIM * NUM_FEATURES,
                None, target, stored,
                HEAD_DIM, WIDTH, INDEX_ROTARY_DIM, HALF_TABLES, UNIT_OFFSET,
                NUM_FEATURES, FEATURE_WIDTH, INDEX_DIM, INDEX_WIDTH, INDEX_TILE,
            )  # fmt: skip

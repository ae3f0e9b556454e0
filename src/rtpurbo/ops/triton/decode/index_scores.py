"""Index scores of a chunk of keys, quantised to levels and counted in a histogram.

An *entry* is the unit of selection: a token, or a block of BLOCK tokens, whose score is the log-sum-exp of
its tokens' scores. Plane 0 holds the far tokens; plane 1 (reading `paper` only) holds all tokens that compete
for the mass, including sinks and window.

A program scores one retrieval head, or those of a KV head that share index keys: a tile of index keys is then read and
converted once, and the scores of all of them are one matrix product.

B sequences, R retrieval heads, I index_dim; M members (retrieval heads of a group), T tokens and E entries of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.decode.histogram import (
    LEVELS,
    count_levels,
    count_loaded_levels,
    level_of,
)
from rtpurbo.ops.triton.device_functions import IEEE, candidate_range, head_start, slot_offsets

# Entries of a group that a program counts at a time.
COUNTED_ENTRIES = tl.constexpr(512)


@triton.jit
def _entry_scores(scores, kept, SHAPE: tl.constexpr):
    """Scores [E] or [E, M] of entries: log-sum-exp of the scores of their `kept` tokens, [T] or [T, M].

    SHAPE is that of the scores with the tokens divided into entries.
    """
    scores = tl.where(kept, scores, float("-inf"))
    if SHAPE[1] > 1:
        blocks = tl.reshape(scores, SHAPE)
        peaks = tl.max(blocks, 1)
        empty = peaks == float("-inf")
        sums = tl.sum(tl.exp(blocks - tl.expand_dims(tl.where(empty, 0.0, peaks), 1)), 1)
        scores = peaks + tl.log(tl.where(empty, 1.0, sums))
    return scores


@triton.jit
def score_chunk(
    index_queries,
    index_query_strides,
    index_keys,
    index_key_strides,
    index_key_heads,
    block_table,
    table_row,
    sequence,
    rank,
    chunk,
    query_position,
    first_slot,
    num_sinks,
    near_window,
    levels,
    histogram,
    references,
    batch,
    num_retrieval,
    padded_entries,
    INDEX_DIM: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    PLANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Scores the entries of one chunk of TILES tiles for retrieval head `rank`.

    `index_key_heads` is int [R], the index key head that each retrieval head reads, or None if each has its
    own. For tiles with candidates it writes `levels` int16 [planes, B, R, padded_entries] and `references`
    [B, R], the scores that levels are relative to, and adds to `histogram` [planes, B, R, LEVELS].
    """
    first, last = candidate_range(query_position, num_sinks, near_window, PLANES == 2)
    last_far = query_position - near_window
    ENTRIES: tl.constexpr = TILE // BLOCK_WIDTH
    first_entry = chunk * TILES * ENTRIES
    end_entry = first_entry + TILES * ENTRIES
    if (last_far >= num_sinks) & (first_entry * BLOCK <= last) & (end_entry * BLOCK > first):
        head = sequence * num_retrieval + rank
        heads_per_plane = batch * num_retrieval
        dims = tl.arange(0, INDEX_WIDTH)
        in_index = dims < INDEX_DIM
        query = tl.load(
            index_queries
            + sequence.to(tl.int64) * index_query_strides[0]
            + rank.to(tl.int64) * index_query_strides[1]
            + dims,
            mask=in_index,
            other=0.0,
        ).to(tl.float32)
        key_head = rank
        if index_key_heads is not None:
            key_head = tl.load(index_key_heads + rank).to(tl.int32)
        index_keys = head_start(index_keys, sequence, key_head, index_key_strides, PAGE_SIZE)
        last_offset = slot_offsets(
            dims * 0 + last_far + first_slot,
            in_index,
            index_key_strides,
            block_table,
            table_row,
            PAGE_SIZE,
        )
        levels += tl.multiple_of(head.to(tl.int64) * padded_entries, 16)
        histogram += head * LEVELS
        tokens = tl.arange(0, TILE)
        within = tokens % BLOCK_WIDTH
        for tile in range(TILES):
            entries = first_entry + tile * ENTRIES + tl.arange(0, ENTRIES)
            positions = first_entry + tile * ENTRIES + tokens // BLOCK_WIDTH
            positions = positions * BLOCK + within
            # Blocks are padded to a power of two.
            scored = (positions >= first) & (positions <= last) & (within < BLOCK)
            offsets = slot_offsets(
                positions + first_slot, scored, index_key_strides, block_table, table_row, PAGE_SIZE
            )
            tile_keys = tl.load(
                index_keys + offsets[:, None] + dims[None, :],
                mask=scored[:, None] & in_index[None, :],
                other=0.0,
            )
            # Loaded inside the loop, so that this key is fetched together with the tile and not before it.
            last_key = tl.load(index_keys + last_offset + dims, mask=in_index, other=0.0)
            reference = tl.sum(last_key.to(tl.float32) * query, 0)
            tl.store(references + head, reference)
            scores = tl.sum(tile_keys.to(tl.float32) * query[None, :], 1)
            for plane in tl.static_range(PLANES):
                kept = scored
                if plane == 0:
                    kept = scored & (positions >= num_sinks) & (positions <= last_far)
                entry_scores = _entry_scores(scores, kept, [ENTRIES, BLOCK_WIDTH])
                entry_levels = level_of(entry_scores, reference)
                first_head = plane * heads_per_plane
                places = (
                    levels + tl.multiple_of(first_head.to(tl.int64) * padded_entries, 16) + entries
                )
                tl.store(places, entry_levels.to(tl.int16))
                count_levels(histogram + first_head * LEVELS, places, entry_levels, ENTRIES)


@triton.jit
def _products(keys, queries):
    """Products [T, M] of index keys [T, I] and index queries [I, M], in their dtype if it is the same."""
    if keys.dtype.primitive_bitwidth == 8:
        keys = keys.to(queries.dtype)
    if keys.dtype != queries.dtype:
        keys = keys.to(tl.float32)
        queries = queries.to(tl.float32)
    return tl.dot(keys, queries, input_precision=IEEE)


@triton.jit
def score_group_chunk(
    index_queries,
    index_query_strides,
    index_keys,
    index_key_strides,
    retrieval_groups,
    block_table,
    table_row,
    sequence,
    group,
    first_member,
    end_member,
    chunk,
    query_position,
    first_slot,
    num_sinks,
    near_window,
    levels,
    histogram,
    references,
    batch,
    num_retrieval,
    padded_entries,
    MEMBERS: tl.constexpr,
    MEMBER_WIDTH: tl.constexpr,
    INDEX_DIM: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    PLANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Scores the entries of one chunk of TILES tiles for members `first_member` to `end_member` of a KV head.

    `retrieval_groups` int [full KV heads, MEMBERS] holds the ranks of the members, -1 for none. Writes what
    `score_chunk` writes.
    """
    first, last = candidate_range(query_position, num_sinks, near_window, PLANES == 2)
    last_far = query_position - near_window
    ENTRIES: tl.constexpr = TILE // BLOCK_WIDTH
    CHUNK_ENTRIES: tl.constexpr = TILES * ENTRIES
    COUNTED: tl.constexpr = min(CHUNK_ENTRIES, COUNTED_ENTRIES)
    first_entry = chunk * CHUNK_ENTRIES
    end_entry = first_entry + CHUNK_ENTRIES
    retrieval_groups += group * MEMBERS
    members = tl.arange(0, MEMBER_WIDTH)
    end_member = tl.minimum(end_member, MEMBERS)
    ranks = tl.load(
        retrieval_groups + members,
        mask=(members >= first_member) & (members < end_member),
        other=-1,
    ).to(tl.int32)
    has_candidates = (first_entry * BLOCK <= last) & (end_entry * BLOCK > first)
    if (last_far >= num_sinks) & has_candidates & (tl.max(ranks, 0) >= 0):
        in_group = ranks >= 0
        heads = sequence * num_retrieval + ranks
        heads_per_plane = batch * num_retrieval
        dims = tl.arange(0, INDEX_WIDTH)
        in_index = dims < INDEX_DIM
        queries = tl.load(
            index_queries
            + sequence.to(tl.int64) * index_query_strides[0]
            + ranks.to(tl.int64)[None, :] * index_query_strides[1]
            + dims[:, None],
            mask=in_index[:, None] & in_group[None, :],
            other=0.0,
        )
        index_keys = head_start(index_keys, sequence, group, index_key_strides, PAGE_SIZE)
        last_offset = slot_offsets(
            dims * 0 + last_far + first_slot,
            in_index,
            index_key_strides,
            block_table,
            table_row,
            PAGE_SIZE,
        )
        last_key = tl.load(index_keys + last_offset + dims, mask=in_index, other=0.0)
        reference = tl.zeros([MEMBER_WIDTH], tl.float32)
        rows = heads.to(tl.int64) * padded_entries
        highest = tl.zeros([ENTRIES, MEMBER_WIDTH], tl.int32)
        highest_of_all = highest
        tokens = tl.arange(0, TILE)
        within = tokens % BLOCK_WIDTH
        for tile in tl.range(TILES, num_stages=STAGES):
            first_of_tile = first_entry + tile * ENTRIES
            entries = first_of_tile + tl.arange(0, ENTRIES)
            positions = (first_of_tile + tokens // BLOCK_WIDTH) * BLOCK + within
            # Blocks are padded to a power of two.
            scored = (positions >= first) & (positions <= last) & (within < BLOCK)
            offsets = slot_offsets(
                positions + first_slot, scored, index_key_strides, block_table, table_row, PAGE_SIZE
            )
            tile_keys = tl.load(
                index_keys + offsets[:, None] + dims[None, :],
                mask=scored[:, None] & in_index[None, :],
                other=0.0,
            )
            if tile == 0:
                # Inside the loop, whose first tiles are fetched together with this key.
                products = last_key.to(tl.float32)[:, None] * queries.to(tl.float32)
                reference = tl.sum(products, 0)
                tl.store(references + heads, reference, mask=in_group)
            scores = _products(tile_keys, queries)
            for plane in tl.static_range(PLANES):
                kept = scored
                if plane == 0:
                    kept = scored & (positions >= num_sinks) & (positions <= last_far)
                entry_scores = _entry_scores(
                    scores, kept[:, None], [ENTRIES, BLOCK_WIDTH, MEMBER_WIDTH]
                )
                entry_levels = level_of(entry_scores, reference[None, :])
                entry_levels = tl.where(in_group[None, :], entry_levels, 0)
                first_head = plane * heads_per_plane
                plane_levels = levels + tl.multiple_of(first_head.to(tl.int64) * padded_entries, 16)
                tl.store(
                    plane_levels + rows[None, :] + entries[:, None],
                    entry_levels.to(tl.int16),
                    mask=in_group[None, :],
                )
                if plane == 0:
                    highest = tl.maximum(highest, entry_levels)
                else:
                    highest_of_all = tl.maximum(highest_of_all, entry_levels)
                if CHUNK_ENTRIES < 128:
                    counts = histogram + (first_head + heads) * LEVELS + LEVELS
                    tl.atomic_add(
                        counts[None, :] - entry_levels,
                        entry_levels * 0 + 1,
                        mask=entry_levels > 0,
                        sem="relaxed",
                    )
        # The levels that are counted are loaded by other threads than stored them.
        tl.debug_barrier()
        for plane in tl.static_range(PLANES):
            if plane == 1:
                highest = highest_of_all
            peaks = tl.max(highest, 0)
            first_head = plane * heads_per_plane
            counts = histogram + (first_head + heads) * LEVELS
            tl.atomic_max(counts, peaks, mask=peaks > 0, sem="relaxed")
            if CHUNK_ENTRIES >= 128:
                for member in range(first_member, end_member):
                    peak = tl.max(tl.where(members == member, peaks, 0), 0)
                    if peak > 0:
                        rank = tl.load(retrieval_groups + member).to(tl.int32)
                        head = first_head + sequence * num_retrieval + rank
                        row = tl.multiple_of(head.to(tl.int64) * padded_entries, 16)
                        for start in range(0, CHUNK_ENTRIES, COUNTED):
                            entries = first_entry + start + tl.arange(0, COUNTED)
                            count_loaded_levels(
                                histogram + head * LEVELS, levels + row + entries, peak
                            )

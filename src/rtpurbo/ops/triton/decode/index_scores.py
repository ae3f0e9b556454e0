"""Index scores of a chunk of keys for one retrieval head, quantised to levels and counted in a histogram.

An *entry* is the unit of selection: a token, or a block of BLOCK tokens, whose score is the log-sum-exp of
its tokens' scores. Plane 0 holds the far tokens; plane 1 (reading `paper` only) holds all tokens that compete
for the mass, including sinks and window.

B sequences, R retrieval heads, I index_dim; T tokens and E entries of a tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.addresses import candidate_range, head_start, slot_offsets
from rtpurbo.ops.triton.decode.histogram import LEVELS, count_levels, level_of


@triton.jit
def _entry_scores(scores, kept, ENTRIES: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Scores [E] of entries: log-sum-exp of their `kept` tokens' scores [T]."""
    scores = tl.where(kept, scores, float("-inf"))
    if BLOCK_WIDTH > 1:
        blocks = tl.reshape(scores, [ENTRIES, BLOCK_WIDTH])
        peaks = tl.max(blocks, 1)
        empty = peaks == float("-inf")
        sums = tl.sum(tl.exp(blocks - tl.where(empty, 0.0, peaks)[:, None]), 1)
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
                entry_levels = level_of(
                    _entry_scores(scores, kept, ENTRIES, BLOCK_WIDTH), reference
                )
                first_head = plane * heads_per_plane
                places = (
                    levels + tl.multiple_of(first_head.to(tl.int64) * padded_entries, 16) + entries
                )
                tl.store(places, entry_levels.to(tl.int16))
                count_levels(histogram + first_head * LEVELS, places, entry_levels, ENTRIES)

"""The indexer's scores of a chunk of keys, for one retrieval head, and what they sum to.

An *entry* is what a head selects: a token, or a block of BLOCK tokens, whose score is the
log-sum-exp of its tokens' scores. Scores are stored in up to two planes: plane 0 holds far tokens
alone; plane 1, under reading `paper`, all that compete for the mass, near ones too.

T tokens of a tile, E entries of a tile, I index_dim, J the power of two that holds it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.decode_addresses import candidate_range, head_start, row_offsets


@triton.jit
def _entry_scores(scores, kept, ENTRIES: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Scores [E] of entries from those of their tokens [T], of which only `kept` ones count."""
    scores = tl.where(kept, scores, float("-inf"))
    if BLOCK_WIDTH > 1:
        blocks = tl.reshape(scores, [ENTRIES, BLOCK_WIDTH])
        peaks = tl.max(blocks, 1)
        empty = peaks == float("-inf")
        sums = tl.sum(tl.exp(blocks - tl.where(empty, 0.0, peaks)[:, None]), 1)
        scores = peaks + tl.log(tl.where(empty, 1.0, sums))
    return scores


@triton.jit
def _fold(peaks, sums, scores):
    """Adds scores to running sums of exponentials, lane by lane."""
    new_peaks = tl.maximum(peaks, scores)
    base = tl.where(new_peaks == float("-inf"), 0.0, new_peaks)
    return new_peaks, sums * tl.exp(peaks - base) + tl.exp(scores - base)


@triton.jit
def _store_sums(peaks, sums, chunk_peaks, chunk_sums, place):
    """Joins the lanes of `_fold` and stores the chunk's peak and its sum of exponentials."""
    peak = tl.max(peaks, 0)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    tl.store(chunk_peaks + place, peak)
    tl.store(chunk_sums + place, tl.sum(sums * tl.exp(peaks - base), 0))


@triton.jit
def scan_chunk(
    index_queries,
    index_query_strides,
    index_keys,
    index_key_strides,
    block_table,
    table_row,
    sequence,
    rank,
    chunk,
    query_position,
    first_slot,
    num_sinks,
    near_window,
    scores,
    chunk_peaks,
    chunk_sums,
    histogram,
    batch,
    num_retrieval,
    num_entries,
    num_chunks,
    INDEX_DIM: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BINS: tl.constexpr,
    PLANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):
    """Scores the entries of one chunk of TILES tiles.

    Writes `scores` [planes, B, retrieval heads, entries] where the chunk holds candidates, and
    `chunk_peaks` and `chunk_sums` [planes, B, retrieval heads, chunks] always. The first chunk of a
    head also clears its `histogram` [planes, B, retrieval heads, BINS], which the next launch fills.
    """
    ENTRIES: tl.constexpr = TILE // BLOCK_WIDTH
    head = sequence * num_retrieval + rank
    heads_of_plane = batch * num_retrieval
    if chunk == 0:
        bins = tl.arange(0, BINS)
        for plane in tl.static_range(PLANES):
            tl.store(histogram + (plane * heads_of_plane + head) * BINS + bins, bins * 0)

    dims = tl.arange(0, INDEX_WIDTH)
    in_row = dims < INDEX_DIM
    query = tl.load(
        index_queries
        + sequence.to(tl.int64) * index_query_strides[0]
        + rank.to(tl.int64) * index_query_strides[1]
        + dims,
        mask=in_row,
        other=0.0,
    ).to(tl.float32)
    index_keys = head_start(index_keys, sequence, rank, index_key_strides, PAGE_SIZE)
    first, last = candidate_range(query_position, num_sinks, near_window, PLANES == 2)
    tokens = tl.arange(0, TILE)
    far_peaks = tl.full([ENTRIES], float("-inf"), tl.float32)
    far_sums = tl.zeros([ENTRIES], tl.float32)
    peaks = tl.full([ENTRIES], float("-inf"), tl.float32)
    sums = tl.zeros([ENTRIES], tl.float32)
    for tile in range(TILES):
        first_entry = (chunk * TILES + tile) * ENTRIES
        if (first_entry * BLOCK <= last) & ((first_entry + ENTRIES) * BLOCK > first):
            within = tokens % BLOCK_WIDTH
            positions = (first_entry + tokens // BLOCK_WIDTH) * BLOCK + within
            # Blocks are padded to a power of two.
            scored = (positions >= first) & (positions <= last) & (within < BLOCK)
            rows = row_offsets(
                positions + first_slot, scored, index_key_strides, block_table, table_row, PAGE_SIZE
            )
            tile_keys = tl.load(
                index_keys + rows[:, None] + dims[None, :],
                mask=scored[:, None] & in_row[None, :],
                other=0.0,
            )
            products = tl.sum(tile_keys.to(tl.float32) * query[None, :], 1)
            far = scored & (positions >= num_sinks) & (positions <= query_position - near_window)
            entries = first_entry + tl.arange(0, ENTRIES)
            in_plane = entries < num_entries
            far_scores = _entry_scores(products, far, ENTRIES, BLOCK_WIDTH)
            places = head.to(tl.int64) * num_entries + entries
            tl.store(scores + places, far_scores, mask=in_plane)
            far_peaks, far_sums = _fold(far_peaks, far_sums, far_scores)
            if PLANES == 2:
                all_scores = _entry_scores(products, scored, ENTRIES, BLOCK_WIDTH)
                places += heads_of_plane.to(tl.int64) * num_entries
                tl.store(scores + places, all_scores, mask=in_plane)
                peaks, sums = _fold(peaks, sums, all_scores)
    _store_sums(far_peaks, far_sums, chunk_peaks, chunk_sums, head * num_chunks + chunk)
    if PLANES == 2:
        place = (heads_of_plane + head) * num_chunks + chunk
        _store_sums(peaks, sums, chunk_peaks, chunk_sums, place)

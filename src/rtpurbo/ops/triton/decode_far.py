"""Attention of a retrieval head over its selected far keys: pick, make a list, gather.

Each program looks at a share of the entries, dealt out in small runs so that a cluster of selected
keys is shared by many programs. Those deep enough within the histogram go into a list, so that the
gathering tiles are full however thinly the selected keys lie.

P programs a head; N keys of a gathered tile, D head_dim, E the power of two that holds it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.triton.decode_addresses import (
    candidate_range,
    head_start,
    row_offsets,
    sequence_extent,
)
from rtpurbo.ops.triton.decode_histogram import BINS, bin_of
from rtpurbo.ops.triton.decode_overlap import start_next_launch, wait_for_last_launch
from rtpurbo.ops.triton.decode_threshold import last_bins


@triton.jit
def list_selected(
    scores,
    lists,
    head,
    heads_of_plane,
    program,
    num_programs,
    num_entries,
    first,
    last,
    far_peak,
    last_far,
    peak,
    last_bin,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    ENTRIES: tl.constexpr,
    PLANES: tl.constexpr,
):
    """Writes the program's selected entries to `lists`, ascending, and returns how many there are."""
    lanes = tl.arange(0, ENTRIES)
    length = tl.zeros([], tl.int32)
    first, last = first // BLOCK, last // BLOCK
    num_rounds = tl.cdiv(last + 1, num_programs * ENTRIES)
    for turn in range(num_rounds):
        runs = (turn * (ENTRIES // RUN) + lanes // RUN) * num_programs + program
        entries = runs * RUN + lanes % RUN
        scored = (entries >= first) & (entries <= last)
        places = scores + head.to(tl.int64) * num_entries + entries
        far_bins = bin_of(far_peak - tl.load(places, mask=scored, other=float("-inf")))
        if PLANES == 2:
            far = far_bins < BINS
            places += heads_of_plane.to(tl.int64) * num_entries
            bins = bin_of(peak - tl.load(places, mask=far, other=float("-inf")))
            selected = (far & (bins <= last_bin)) | (far_bins <= last_far)
        else:
            selected = far_bins <= tl.maximum(last_bin, last_far)
        order = tl.cumsum(selected.to(tl.int32), 0)
        tl.store(lists + length + order - 1, entries, mask=selected)
        length += tl.max(order, 0)
    return length


# Sizes that a kernel is not compiled for anew: not even for 1, of which the compiler makes a constant.
SIZES = [
    "table_stride",
    "capacity",
    "num_heads",
    "num_retrieval",
    "num_splits",
    "num_entries",
    "num_chunks",
    "list_length",
    "heads_of_plane",
    "num_sinks",
    "near_window",
    "floor",
]


@triton.jit(do_not_specialize=SIZES)
def far_kernel(
    queries,
    query_strides,
    keys,
    key_strides,
    values,
    value_strides,
    block_table,
    table_stride,
    lengths,
    first_slots,
    retrieval_heads,
    readers,
    near_log_sums,
    scores,
    chunk_peaks,
    chunk_sums,
    histogram,
    lists,
    list_lengths,
    log_sums,
    outputs,
    capacity,
    num_heads,
    num_retrieval,
    num_splits,
    num_entries,
    num_chunks,
    list_length,
    heads_of_plane,
    num_sinks,
    near_window,
    top_p,
    far_floor,
    floor,
    scale,
    CHUNK_WIDTH: tl.constexpr,
    SPLIT_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
    ENTRIES: tl.constexpr,
    PLANES: tl.constexpr,
    READING: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    EVERYTHING: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Program (share of the entries, sequence and retrieval head).

    Writes `log_sums` [B, retrieval heads, P] to base 2 and `outputs` [B, retrieval heads, P, D]. Unless
    EVERYTHING far is read, it leaves the selected entries in `lists` [B, retrieval heads, P,
    list_length] and how many they are in `list_lengths` [B, retrieval heads, P].
    """
    start_next_launch(OVERLAP)
    wait_for_last_launch(OVERLAP)
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    head = tl.program_id(1)
    sequence = head // num_retrieval
    rank = head % num_retrieval
    query_position, first_slot = sequence_extent(
        sequence, capacity, lengths, first_slots, PAGE_SIZE
    )
    place = head * num_programs + program
    query_head = tl.load(retrieval_heads + rank)
    last_far_position = query_position - near_window
    num_tokens = tl.zeros([], tl.int32)
    if not EVERYTHING:
        tl.store(list_lengths + place, 0)
    lists += place.to(tl.int64) * list_length
    if last_far_position >= num_sinks:
        if EVERYTHING:
            # Tiles are dealt out in turn.
            num_tiles = tl.cdiv(last_far_position + 1 - num_sinks, TILE)
            num_tokens += tl.maximum(0, tl.cdiv(num_tiles - program, num_programs)) * TILE
        else:
            far_peak, last_far, peak, last_bin = last_bins(
                histogram,
                chunk_peaks,
                chunk_sums,
                near_log_sums,
                head,
                sequence * num_heads + query_head,
                heads_of_plane,
                num_chunks,
                num_splits,
                top_p,
                far_floor,
                floor,
                CHUNK_WIDTH,
                SPLIT_WIDTH,
                READING,
            )
            first, last = candidate_range(query_position, num_sinks, near_window, PLANES == 2)
            length = list_selected(
                scores,
                lists,
                head,
                heads_of_plane,
                program,
                num_programs,
                num_entries,
                first,
                last,
                far_peak,
                last_far,
                peak,
                last_bin,
                BLOCK,
                RUN,
                ENTRIES,
                PLANES,
            )
            tl.store(list_lengths + place, length)
            # Other threads of the program read what these have written.
            tl.debug_barrier()
            num_tokens += length * BLOCK

    dims = tl.arange(0, WIDTH)
    in_row = dims[None, :] < HEAD_DIM
    query = tl.load(
        queries
        + sequence.to(tl.int64) * query_strides[0]
        + query_head.to(tl.int64) * query_strides[1]
        + dims,
        mask=dims < HEAD_DIM,
        other=0.0,
    ).to(tl.float32)
    reader = tl.load(readers + rank)
    keys = head_start(keys, sequence, reader, key_strides, PAGE_SIZE)
    values = head_start(values, sequence, reader, value_strides, PAGE_SIZE)
    table_row = sequence * table_stride
    # Each lane of a tile keeps a softmax of its own; they are joined at the end, so that the loop
    # needs no reduction over the tile.
    lanes = tl.arange(0, TILE)
    peaks = tl.full([TILE], float("-inf"), tl.float32)
    totals = tl.zeros([TILE], tl.float32)
    accumulators = tl.zeros([TILE, WIDTH], tl.float32)
    for start in range(0, num_tokens, TILE):
        if EVERYTHING:
            positions = num_sinks + (start * num_programs + program * TILE) + lanes
            listed = positions >= 0
        else:
            tokens = start + lanes
            listed = tokens < num_tokens
            entries = tl.load(lists + tokens // BLOCK, mask=listed, other=0)
            positions = entries * BLOCK + tokens % BLOCK
        # The first and the last block may hold near tokens too.
        read = listed & (positions >= num_sinks) & (positions <= last_far_position)
        slots = positions + first_slot
        loaded = read[:, None] & in_row
        key_rows = row_offsets(slots, read, key_strides, block_table, table_row, PAGE_SIZE)
        value_rows = row_offsets(slots, read, value_strides, block_table, table_row, PAGE_SIZE)
        tile_keys = tl.load(keys + key_rows[:, None] + dims[None, :], mask=loaded, other=0.0)
        tile_values = tl.load(values + value_rows[:, None] + dims[None, :], mask=loaded, other=0.0)
        logits = tl.sum(tile_keys.to(tl.float32) * query[None, :], 1) * scale
        logits = tl.where(read, logits, float("-inf"))
        new_peaks = tl.maximum(peaks, logits)
        # A lane that has read nothing yet has no peak to measure from.
        base = tl.where(new_peaks == float("-inf"), 0.0, new_peaks)
        weights = tl.exp2(logits - base)
        shrink = tl.exp2(peaks - base)
        totals = totals * shrink + weights
        accumulators = accumulators * shrink[:, None]
        accumulators += weights[:, None] * tile_values.to(tl.float32)
        peaks = new_peaks

    peak_of_all = tl.max(peaks, 0)
    base_of_all = tl.where(peak_of_all == float("-inf"), 0.0, peak_of_all)
    shares = tl.exp2(peaks - base_of_all)
    total = tl.sum(totals * shares, 0)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    tl.store(log_sums + place, tl.where(empty, float("-inf"), peak_of_all + tl.log2(total)))
    tl.store(
        outputs + place.to(tl.int64) * HEAD_DIM + dims,
        tl.sum(accumulators * shares[:, None], 0) / total,
        mask=dims < HEAD_DIM,
    )

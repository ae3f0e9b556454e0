"""First kernel of a decode step: window attention of all heads, and index scores of the far keys.

Both parts are memory-bound and independent, so one launch with programs of both kinds fills the GPU. The
programs of window attention run longer and come first.

B sequences, H query heads, K KV heads (full and windowed), R retrieval heads, D head_dim, I index_dim.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rtpurbo.ops.states import index_key_heads
from rtpurbo.ops.triton.decode.index_scores import score_chunk, score_group_chunk
from rtpurbo.ops.triton.decode.pdl import allow_dependent_launch, supports_pdl
from rtpurbo.ops.triton.decode.window import window_split
from rtpurbo.ops.triton.decode.workspace import (
    TILE_ELEMENTS,
    DecodeStep,
    IndexScores,
    PartialAttention,
    cache_arguments,
    entries_per_chunk,
    strides,
)
from rtpurbo.ops.triton.device_functions import LOG2_E, sequence_extent

# Window keys of one program, at least, and at most where there are more programs than WINDOW_PROGRAMS; and pipeline
# stages of its loop over tiles.
SPLIT = 128
MAX_SPLIT = 1024
WINDOW_PROGRAMS = 792
WINDOW_STAGES = 2
# Programs that score keys, at most: each scores every n-th chunk. A cache is often much larger than its contents, and
# the next kernel cannot begin before programs without keys have run too.
MAX_SCORE_PROGRAMS = 1056
# Programs that score keys, from which on each scores all retrieval heads of a KV head that share index keys; the
# most scores of a tile of such a program; and pipeline stages of its loop over tiles, with so many bytes at most.
SCORE_PROGRAMS = 512
GROUP_SCORES = 1024
SCORE_STAGES = 5
SCORE_STAGES_BYTES = 32768

# Not specialised: a value of 1 or a multiple of 16 does not compile another kernel.
SIZES = [
    "position_stride",
    "table_stride",
    "capacity",
    "batch",
    "num_heads",
    "num_full",
    "num_windowed",
    "num_retrieval",
    "num_windowed_slots",
    "num_splits",
    "split_keys",
    "padded_entries",
    "members_per_program",
    "chunk_programs",
    "num_sinks",
    "near_window",
    "sliding_window",
    "widest_window",
]


@triton.jit(do_not_specialize=SIZES)
def window_and_scores_kernel(
    queries,
    query_strides,
    full_keys,
    full_key_strides,
    full_values,
    full_value_strides,
    block_table,
    table_stride,
    lengths,
    first_slots,
    windowed_keys,
    windowed_key_strides,
    windowed_values,
    windowed_value_strides,
    windowed_block_table,
    windowed_table_stride,
    slot_positions,
    position_stride,
    index_queries,
    index_query_strides,
    index_keys,
    index_key_strides,
    index_key_heads,
    retrieval_groups,
    full_heads,
    windowed_heads,
    retrieval_heads,
    log_sums,
    outputs,
    levels,
    histogram,
    references,
    capacity,
    batch,
    num_heads,
    num_full,
    num_windowed,
    num_retrieval,
    num_windowed_slots,
    num_splits,
    split_keys,
    padded_entries,
    members_per_program,
    chunk_programs,
    num_sinks,
    near_window,
    sliding_window,
    widest_window,
    scale,
    GROUP: tl.constexpr,
    GROUP_WIDTH: tl.constexpr,
    RETRIEVAL_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    WINDOW_TILE: tl.constexpr,
    MEMBERS: tl.constexpr,
    MEMBER_WIDTH: tl.constexpr,
    INDEX_DIM: tl.constexpr,
    INDEX_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    SCORE_TILE: tl.constexpr,
    SCORE_TILES: tl.constexpr,
    SCORE_STAGES: tl.constexpr,
    PLANES: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    WINDOWED_PAGE_SIZE: tl.constexpr,
    SCORE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Programs (full KV head, split), then (windowed KV head, split), then (first chunk, retrieval heads).

    Each of the last kind scores every `chunk_programs`-th chunk for one retrieval head, or for `members_per_program` of
    the MEMBERS at most of a KV head (`retrieval_groups`) if MEMBERS is not 0. Programs with the same index keys are
    adjacent, so that a chunk of keys is in the L2 cache for them.
    """
    allow_dependent_launch(PDL)
    program = tl.program_id(0)
    sequence = tl.program_id(1)
    query_position, first_slot = sequence_extent(
        sequence, capacity, lengths, first_slots, PAGE_SIZE
    )
    table_row = sequence * table_stride
    window_programs = (num_full + num_windowed) * num_splits
    # Chunks with candidates end with the last far key, or with the query.
    num_chunks = query_position // (SCORE_TILE // BLOCK_WIDTH * SCORE_TILES * BLOCK) + 1
    if program < num_full * num_splits:
        key_value_head = program // num_splits
        window_keys = tl.maximum(query_position - num_sinks + 1, 0)
        window_split(
            queries, query_strides, full_keys, full_key_strides, full_values, full_value_strides,
            block_table, table_row, slot_positions, position_stride,
            tl.minimum(query_position + 1, num_sinks) + tl.minimum(window_keys, widest_window),
            sequence, program % num_splits, key_value_head,
            tl.load(full_heads + key_value_head).to(tl.int32) * GROUP, retrieval_heads,
            query_position, first_slot, num_sinks, near_window, sliding_window, widest_window,
            scale, log_sums, outputs, num_heads, num_splits, split_keys, num_retrieval, GROUP,
            GROUP_WIDTH, RETRIEVAL_WIDTH, HEAD_DIM, WIDTH, WINDOW_TILE, PAGE_SIZE, False,
        )  # fmt: skip
    elif program < window_programs:
        key_value_head = program // num_splits - num_full
        windowed_row = table_row
        num_entries = num_windowed_slots
        if WINDOWED_PAGE_SIZE > 0:
            windowed_row = sequence * windowed_table_stride
            window_keys = tl.maximum(query_position - num_sinks + 1, 0)
            num_entries = tl.minimum(query_position + 1, num_sinks)
            num_entries += tl.minimum(window_keys, sliding_window)
        window_split(
            queries, query_strides, windowed_keys, windowed_key_strides, windowed_values,
            windowed_value_strides, windowed_block_table, windowed_row, slot_positions,
            position_stride, num_entries, sequence, program % num_splits, key_value_head,
            tl.load(windowed_heads + key_value_head).to(tl.int32) * GROUP, retrieval_heads,
            query_position, first_slot, num_sinks, near_window, sliding_window, sliding_window,
            scale, log_sums, outputs, num_heads, num_splits, split_keys, num_retrieval, GROUP,
            GROUP_WIDTH, RETRIEVAL_WIDTH, HEAD_DIM, WIDTH, WINDOW_TILE, WINDOWED_PAGE_SIZE,
            WINDOWED_PAGE_SIZE == 0,
        )  # fmt: skip
    elif SCORE and MEMBERS > 0:
        splits = tl.cdiv(MEMBERS, members_per_program)
        program -= window_programs
        first_member = program % splits * members_per_program
        first_chunk = program // splits // num_full
        for chunk in range(first_chunk, num_chunks, chunk_programs):
            score_group_chunk(
                index_queries, index_query_strides, index_keys, index_key_strides, retrieval_groups,
                block_table, table_row, sequence, program // splits % num_full, first_member,
                first_member + members_per_program, chunk, query_position, first_slot, num_sinks,
                near_window, levels, histogram, references, batch, num_retrieval, padded_entries,
                MEMBERS, MEMBER_WIDTH, INDEX_DIM, INDEX_WIDTH, BLOCK, BLOCK_WIDTH, SCORE_TILE,
                SCORE_TILES, SCORE_STAGES, PLANES, PAGE_SIZE,
            )  # fmt: skip
    elif SCORE:
        program -= window_programs
        for chunk in range(program // num_retrieval, num_chunks, chunk_programs):
            score_chunk(
                index_queries, index_query_strides, index_keys, index_key_strides, index_key_heads,
                block_table, table_row, sequence, program % num_retrieval, chunk, query_position,
                first_slot, num_sinks, near_window, levels, histogram, references, batch,
                num_retrieval, padded_entries, INDEX_DIM, INDEX_WIDTH, BLOCK, BLOCK_WIDTH,
                SCORE_TILE, SCORE_TILES, PLANES, PAGE_SIZE,
            )  # fmt: skip


def window_and_scores(step: DecodeStep) -> tuple[PartialAttention, IndexScores]:
    """Window attention of B * H heads, and index scores of B * R heads."""
    queries, full, windowed, rule, layout = (
        step.queries, step.full, step.windowed, step.rule, step.layout,
    )  # fmt: skip
    index_queries = step.index_queries
    batch, num_heads, _, head_dim = queries.shape
    num_full = layout.full_key_value_heads.numel()
    num_windowed = layout.windowed_key_value_heads.numel()
    num_retrieval = step.num_retrieval
    score = num_retrieval > 0 and rule.top_p < 1
    key_heads = None
    if score:
        assert full.index_keys is not None
        key_heads = index_key_heads(full.index_keys, num_full, layout.retrieval.key_value_heads)
    scores = IndexScores.allocate(step, batch * num_retrieval * score)

    widest = max(rule.near_window, rule.sliding_window if len(layout.local_full) else 0)
    num_near = min(rule.num_sink_tokens + widest, full.capacity) if num_full else 0
    num_windowed_slots = 0
    if num_windowed:
        num_windowed_slots = windowed.capacity
        if windowed.page_size:  # which may hold more keys than are read
            num_windowed_slots = min(rule.num_sink_tokens + rule.sliding_window, windowed.capacity)
    num_keys = max(1, num_near, num_windowed_slots)
    split_keys = SPLIT
    heads = batch * (num_full + num_windowed)
    while split_keys < MAX_SPLIT and heads * triton.cdiv(num_keys, split_keys) > WINDOW_PROGRAMS:
        split_keys *= 2
    num_splits = triton.cdiv(num_keys, split_keys)
    max_splits = triton.cdiv(num_keys, SPLIT)
    window = PartialAttention.allocate(queries, batch * num_heads, num_splits, max_splits)

    group = num_heads // (num_full + num_windowed)
    width = max(16, triton.next_power_of_2(head_dim))
    # fp32 products do not run on tensor cores and need more registers.
    window_tile = TILE_ELEMENTS // (2 if queries.element_size() == 2 else 8) // width
    window_tile = max(16, min(64, window_tile))
    index_dim = 1 if index_queries is None else index_queries.shape[-1]
    index_width = triton.next_power_of_2(index_dim)
    block_width = triton.next_power_of_2(scores.block)
    chunk_tokens = entries_per_chunk(scores.block) * block_width
    chunk_programs = scores.num_chunks
    score_programs = num_retrieval * score
    members = members_per_program = member_width = 0
    if key_heads is not None and layout.retrieval_groups.shape[1] > 1:
        # Shared index keys: a product with the index queries of several heads.
        members = layout.retrieval_groups.shape[1]
        member_width = max(8, triton.next_power_of_2(members))
        index_width = max(16, index_width)
        chunks = scores.num_chunks * num_full
        splits = min(members, triton.cdiv(SCORE_PROGRAMS, chunks * batch))
        members_per_program = triton.cdiv(members, splits)
        score_programs = num_full * triton.cdiv(members, members_per_program)
    if score:
        most = triton.cdiv(MAX_SCORE_PROGRAMS, score_programs * batch)
        chunk_programs = min(scores.num_chunks, most)
    score_tile = min(chunk_tokens, TILE_ELEMENTS // index_width)
    if members:
        score_tile = min(score_tile, GROUP_SCORES // member_width)
    score_tile = max(block_width, score_tile)
    score_stages = 0
    if members and full.index_keys is not None:
        tile_bytes = score_tile * index_width * full.index_keys.element_size()
        score_stages = max(2, min(SCORE_STAGES, 1 + SCORE_STAGES_BYTES // tile_bytes))
    programs = (num_full + num_windowed) * num_splits + score_programs * chunk_programs
    window_and_scores_kernel[(programs, batch)](
        queries,
        queries.stride()[:2],
        *cache_arguments(full),
        full.lengths,
        full.first_slots,
        *cache_arguments(windowed),
        windowed.positions,
        0 if windowed.positions is None else windowed.positions.stride(0),
        index_queries,
        (0, 0) if index_queries is None else index_queries.stride()[:2],
        full.index_keys,
        strides(full.index_keys),
        key_heads,
        layout.retrieval_groups,
        layout.full_key_value_heads,
        layout.windowed_key_value_heads,
        layout.retrieval.heads,
        window.log_sums,
        window.outputs,
        scores.levels,
        scores.histogram,
        scores.references,
        full.capacity,
        batch,
        num_heads,
        num_full,
        num_windowed,
        num_retrieval,
        num_windowed_slots,
        num_splits,
        split_keys,
        scores.levels.shape[1],
        members_per_program,
        chunk_programs,
        rule.num_sink_tokens,
        rule.near_window,
        rule.sliding_window,
        widest,
        step.scaling * LOG2_E.value,
        GROUP=group,
        GROUP_WIDTH=max(16, triton.next_power_of_2(group)),
        RETRIEVAL_WIDTH=triton.next_power_of_2(max(1, num_retrieval)),
        HEAD_DIM=head_dim,
        WIDTH=width,
        WINDOW_TILE=window_tile,
        MEMBERS=members,
        MEMBER_WIDTH=member_width,
        INDEX_DIM=index_dim,
        INDEX_WIDTH=index_width,
        BLOCK=scores.block,
        BLOCK_WIDTH=block_width,
        SCORE_TILE=score_tile,
        SCORE_TILES=chunk_tokens // score_tile,
        SCORE_STAGES=score_stages,
        PLANES=scores.planes,
        PAGE_SIZE=full.page_size,
        WINDOWED_PAGE_SIZE=windowed.page_size,
        SCORE=score,
        PDL=supports_pdl(queries.device),
        num_warps=4,
        num_stages=WINDOW_STAGES,
    )
    return window, scores

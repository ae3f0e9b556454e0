"""Unselected far keys as block means: semantics of `rtpurbo.ops.eager.unselected`.

The index scores are already quantised (`histogram`): each unselected entry has the mass at the middle of its level,
as in the selection, which deviates from its estimate by a factor of at most exp(LEVEL_WIDTH / 2).

B sequences, R retrieval heads, D head_dim; N blocks of a tile, E entries of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.states import HeadLayout
from rtpurbo.ops.triton.addresses import head_start, sequence_extent
from rtpurbo.ops.triton.decode.histogram import DEPTH, LEVEL_WIDTH
from rtpurbo.ops.triton.decode.pdl import (
    allow_dependent_launch,
    dependent_launch,
    wait_for_dependencies,
)
from rtpurbo.ops.triton.decode.workspace import (
    FullStates,
    IndexScores,
    PartialAttention,
    Selection,
    strides,
)
from rtpurbo.ops.triton.softmax import LOG2_E, log_sum_exp
from rtpurbo.ops.value_means import mean_values

# Programs that share the blocks of a head; fixed, so that the capacity does not compile another `combine_kernel`.
UNSELECTED_SPLITS = 32
# Largest number of blocks of a tile, and of elements of a tile of levels or means.
TILE_BLOCKS = 16
UNSELECTED_TILE_ELEMENTS = 4096

# Not specialised: a value of 1 or a multiple of 16 does not compile another kernel.
SIZES = ["capacity", "num_retrieval", "padded_entries", "num_sinks", "near_window"]


@triton.jit(do_not_specialize=SIZES)
def unselected_kernel(
    levels,
    references,
    lowest_levels,
    value_means,
    mean_strides,
    lengths,
    first_slots,
    kv_head_index,
    log_sums,
    outputs,
    capacity,
    num_retrieval,
    padded_entries,
    num_sinks,
    near_window,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
    ENTRIES_WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program (split of the blocks, sequence and retrieval head).

    A block has ENTRIES entries of BLOCK tokens. Reads the far entries of `levels` [B, R, padded_entries] that
    are below `lowest_levels` [B, R]. Writes `log_sums` [B, R, splits] to base 2 and `outputs` [B, R, splits, D].
    """
    allow_dependent_launch(PDL)
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    head = tl.program_id(1)
    sequence = head // num_retrieval
    query_position, _ = sequence_extent(sequence, capacity, lengths, first_slots, 0)
    last_far_position = query_position - near_window
    first_entry = num_sinks // BLOCK
    last_entry = last_far_position // BLOCK
    first_block = first_entry // ENTRIES
    end_block = tl.where(last_far_position >= num_sinks, last_entry // ENTRIES + 1, 0)
    key_value_head = tl.load(kv_head_index + head % num_retrieval)
    value_means = head_start(value_means, sequence, key_value_head, mean_strides, 0)
    levels += head.to(tl.int64) * padded_entries
    tile_blocks = tl.arange(0, TILE)
    within = tl.arange(0, ENTRIES_WIDTH)
    dims = tl.arange(0, WIDTH)
    totals = tl.zeros([TILE], tl.float32)
    accumulators = tl.zeros([TILE, WIDTH], tl.float32)
    wait_for_dependencies(PDL)
    # Undefined for a head without far keys, whose loop is empty.
    lowest = tl.load(lowest_levels + head)
    reference = tl.load(references + head)
    # Masses are relative to the highest level that can be unselected.
    highest = lowest - 1
    for start in range(first_block + program * TILE, end_block, num_programs * TILE):
        blocks = start + tile_blocks
        # Blocks with far keys are whole.
        whole = blocks < end_block
        entries = blocks[:, None] * ENTRIES + within[None, :]
        far = (entries >= first_entry) & (entries <= last_entry) & (within < ENTRIES)[None, :]
        entry_levels = tl.load(levels + entries, mask=far, other=0).to(tl.int32)
        means = tl.load(
            value_means + blocks[:, None].to(tl.int64) * mean_strides[2] + dims[None, :],
            mask=whole[:, None] & (dims < HEAD_DIM)[None, :],
            other=0.0,
        )
        unselected = (entry_levels > 0) & (entry_levels <= highest)
        masses = tl.exp(tl.minimum(entry_levels - highest, 0) * LEVEL_WIDTH)
        block_masses = tl.sum(tl.where(unselected, masses, 0.0), 1)
        totals += block_masses
        accumulators += block_masses[:, None] * means.to(tl.float32)
    total = tl.sum(totals, 0)
    output = tl.sum(accumulators, 0) / tl.where(total == 0.0, 1.0, total)
    middle = reference + (highest - DEPTH + 0.5) * LEVEL_WIDTH
    place = head * num_programs + program
    tl.store(log_sums + place, log_sum_exp(middle * LOG2_E, total))
    tl.store(outputs + place.to(tl.int64) * HEAD_DIM + dims, output, mask=dims < HEAD_DIM)


def unselected_attention(
    queries: Tensor,
    full: FullStates,
    layout: HeadLayout,
    rule: AttentionRule,
    scores: IndexScores,
    selection: Selection,
) -> PartialAttention:
    """Partial attention of B * R heads over the block means of the unselected far keys.

    Args:
        queries: [B, H, 1, D].
        full: cache of the full KV heads. Without `value_means`, all of them are computed from the values.
        layout: query heads by kind.
        rule: windows and block size.
        scores: index scores of the far keys.
        selection: with `lowest_levels`.
    """
    batch, _, _, head_dim = queries.shape
    num_retrieval = len(layout.retrieval)
    value_means = full.value_means
    if value_means is None:
        blocks = torch.arange(triton.cdiv(full.capacity, rule.block_size), device=queries.device)
        value_means = mean_values(
            full.values, blocks.expand(batch, -1), rule.block_size, full.first_slots
        )
    partial = PartialAttention.allocate(queries, batch * num_retrieval, UNSELECTED_SPLITS)
    entries = rule.block_size // scores.block
    entries_width = triton.next_power_of_2(entries)
    width = triton.next_power_of_2(head_dim)
    tile = max(1, min(TILE_BLOCKS, UNSELECTED_TILE_ELEMENTS // max(entries_width, width)))
    unselected_kernel[(UNSELECTED_SPLITS, batch * num_retrieval)](
        scores.levels,
        scores.references,
        selection.lowest_levels,
        value_means,
        strides(value_means),
        full.lengths,
        full.first_slots,
        layout.retrieval.key_value_heads,
        partial.log_sums,
        partial.outputs,
        full.capacity,
        num_retrieval,
        scores.levels.shape[1],
        rule.num_sink_tokens,
        rule.near_window,
        BLOCK=scores.block,
        ENTRIES=entries,
        ENTRIES_WIDTH=entries_width,
        HEAD_DIM=head_dim,
        WIDTH=width,
        TILE=tile,
        **dependent_launch(queries.device),
        num_warps=4,
    )
    return partial

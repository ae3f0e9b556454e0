"""Block lists for tiles of query rows: how the kernels in `scoring_kernels` are launched."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
from torch import Tensor
from triton import knobs

from rtpurbo.config import AttentionRule
from rtpurbo.ops.paged import PagedStates
from rtpurbo.ops.states import KeyValueStates, index_key_heads
from rtpurbo.ops.triton.heads import HeadTable
from rtpurbo.ops.triton.prefill.portable import BlockLists, page_size, slot_shifts
from rtpurbo.ops.triton.prefill.scoring_kernels import (
    bars_kernel,
    flags_kernel,
    lists_kernel,
    peaks_kernel,
)

# Blocks that one program of the scan walks over.
RANGE = 64
# Bytes of peaks, and of flags and lists, that are held at once.
SCRATCH = 2**28


def block_lists(
    index_queries: Tensor,
    states: KeyValueStates | PagedStates,
    table: HeadTable,
    starts: Tensor,
    near_log_sum_exp: Tensor,
    rule: AttentionRule,
) -> Iterator[tuple[int, BlockLists]]:
    """Lists for all rows of a call, some thousands of rows at a time.

    They hold what `rtpurbo.ops.eager.selection.select_for_tiles` selects under `row_peak`, but for
    blocks whose peak comes within the rounding of fp16 (2**-11 of the score) to the bar.

    Args:
        index_queries: [batch, num_retrieval_heads, q_len, index_dim].
        states: with index keys.
        table: the retrieval heads, with their near windows.
        starts: int32 [batch], position of the first query row.
        near_log_sum_exp: fp32 [batch, num_attention_heads, q_len], natural, of the near keys.
        rule: `row_share`, `block_size` and `query_block_size`.

    Yields:
        The row at which the lists begin, and the lists.
    """
    index_keys, block_table, capacity = _index_keys(states)
    keys = states.key_pages if isinstance(states, PagedStates) else states.keys
    key_heads = index_key_heads(index_keys, keys.shape[1], table.key_value_heads)
    # Keys kept in float8 are multiplied as what the queries are: a prompt reads each many times.
    index_keys = index_keys.to(index_queries.dtype)
    batch, heads, q_len, index_dim = index_queries.shape
    M, N, stride = rule.query_block_size, rule.block_size, rule.row_stride
    lanes = M // stride
    group = max(1, 128 // N)
    # The interpreter has no assembly.
    packed = index_keys.dtype == torch.float16 and not knobs.runtime.interpret
    device = index_queries.device
    blocks = triton.cdiv(capacity, N)
    ranges = triton.cdiv(blocks, RANGE)
    edge = edge_slots(rule)
    width = edge + blocks
    I = max(16, triton.next_power_of_2(index_dim))
    listed_tiles = _tiles_within(SCRATCH, batch * heads * (blocks + 4 * width), q_len, M)
    scored_tiles = min(
        listed_tiles, _tiles_within(SCRATCH, batch * heads * blocks * lanes * 2, q_len, M)
    )
    peaks = torch.empty(
        batch, heads, scored_tiles, blocks, lanes, dtype=torch.float16, device=device
    )
    sums = torch.empty(
        batch, heads, scored_tiles, ranges, lanes, dtype=torch.float32, device=device
    )
    slots, _ = slot_shifts(states)
    has_slots = slots is not None
    for row_offset in range(0, q_len, listed_tiles * M):
        tiles = min(listed_tiles, triton.cdiv(q_len - row_offset, M))
        flags = torch.empty(batch, heads, tiles, blocks, dtype=torch.int8, device=device)
        lists = torch.empty(batch, heads, tiles, width, dtype=torch.int32, device=device)
        counts = torch.empty(batch, heads, tiles, 2, dtype=torch.int32, device=device)
        for tile in range(0, tiles, scored_tiles):
            scored = min(scored_tiles, tiles - tile)
            row = row_offset + tile * M
            bars = torch.empty(batch, heads, scored, lanes, dtype=torch.float32, device=device)
            peaks_kernel[(scored * ranges, batch * heads)](
                index_queries, index_keys, index_keys.stride()[:3], key_heads,
                block_table, 0 if block_table is None else block_table.stride(0), peaks, sums,
                table.windows, starts, slots if has_slots else starts,
                q_len, heads, ranges, row, index_dim, rule.num_sink_tokens,
                *index_queries.stride()[:3],
                *peaks.stride()[:4], *sums.stride()[:4],
                HAS_SLOTS=has_slots, PAGE_SIZE=page_size(states), STAGES=3, PACKED=packed, STRIDE=stride,
                M=M, N=N, R=RANGE, G=group, I=I, num_warps=4,
            )  # fmt: skip
            bars_kernel[(scored, batch * heads)](
                sums, near_log_sum_exp, bars, table.heads, table.windows, starts,
                q_len, heads, row, math.log(rule.row_share),
                *sums.stride()[:4], *near_log_sum_exp.stride()[:2],
                STRIDE=stride, M=M, N=N, R=RANGE, num_warps=4,
            )  # fmt: skip
            flags_kernel[(scored * ranges, batch * heads)](
                peaks, bars, flags, table.windows, starts,
                q_len, heads, ranges, row, blocks, tile, tiles,
                *peaks.stride()[:4], LANES=lanes, M=M, N=N, R=RANGE, num_warps=4,
            )  # fmt: skip
        lists_kernel[(tiles, batch * heads)](
            flags, lists, counts, table.windows, starts,
            q_len, heads, row_offset, blocks, width, rule.num_sink_tokens,
            EDGE=edge, M=M, N=N, C=1024, num_warps=4,
        )  # fmt: skip
        yield row_offset, BlockLists(lists, counts, edge, N, M)


def _index_keys(states: KeyValueStates | PagedStates) -> tuple[Tensor, Tensor | None, int]:
    """Index keys or their pages, the block table if they are in pages, and room for how many tokens."""
    if isinstance(states, PagedStates):
        assert states.index_pages is not None
        return states.index_pages, states.block_table, states.capacity
    assert states.index_keys is not None
    return states.index_keys, None, states.index_keys.shape[2]


def far_keys(
    lists: BlockLists,
    starts: Tensor,
    table: HeadTable,
    row_offset: int,
    q_len: int,
    rule: AttentionRule,
) -> tuple[float, float, int]:
    """What `SelectionStatistics` counts: far keys, those of them in listed blocks, rows that have any."""
    tiles, size, device = lists.blocks.shape[2], lists.block_size, lists.blocks.device
    places = torch.arange(lists.blocks.shape[-1], device=device)
    edge, whole = lists.counts[..., :1], lists.counts[..., 1:]
    used = (places < edge) | ((places >= lists.edge_slots) & (places < lists.edge_slots + whole))
    rows = row_offset + torch.arange(tiles * lists.tile_size, device=device)
    # [batch, heads, rows]: the last far key of each row; none if that lies before the first.
    last = starts[:, None, None] + rows - table.windows[None, :, None]
    last = last.masked_fill(rows >= q_len, -1)
    counts = (last - rule.num_sink_tokens + 1).clamp(min=0)
    read = 0
    for tile in range(tiles):
        blocks = lists.blocks[:, :, tile, None] * size
        tile_last = last[:, :, tile * lists.tile_size : (tile + 1) * lists.tile_size, None]
        keys = torch.minimum(tile_last + 1, blocks + size) - blocks.clamp(min=rule.num_sink_tokens)
        read += int((keys.clamp(min=0) * used[:, :, tile, None]).sum())
    return float(counts.sum()), float(read), int((counts > 0).sum())


def edge_slots(rule: AttentionRule) -> int:
    """Room for the blocks of a list that need a mask, an even number."""
    sinks = triton.cdiv(rule.num_sink_tokens, rule.block_size)
    window_edge = triton.cdiv(rule.query_block_size, rule.block_size) + 1
    return 2 * triton.cdiv(sinks + window_edge + 1, 2)


def _tiles_within(limit: int, bytes_a_tile: int, q_len: int, rows: int) -> int:
    return max(1, min(limit // max(1, bytes_a_tile), triton.cdiv(q_len, rows)))

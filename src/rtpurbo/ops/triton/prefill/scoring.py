"""Block selection in prefill (`row_peak`): launches of `scoring_kernels`, which make the block lists."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import triton
from torch import Tensor
from triton import knobs

from rtpurbo.config import AttentionRule
from rtpurbo.ops.states import KeyValueStates, index_key_heads
from rtpurbo.ops.triton.heads import HeadTable
from rtpurbo.ops.triton.prefill.portable import BlockLists
from rtpurbo.ops.triton.prefill.scoring_kernels import (
    block_maxima_kernel,
    flags_kernel,
    lists_kernel,
    thresholds_kernel,
)

# Blocks that one program scores.
RANGE = 64
# Limit in bytes on the block maxima, and on flags and lists, of one chunk of queries.
SCRATCH = 2**28


def block_lists(
    index_queries: Tensor,
    states: KeyValueStates,
    table: HeadTable,
    starts: Tensor,
    near_log_sum_exp: Tensor,
    rule: AttentionRule,
) -> Iterator[tuple[int, BlockLists]]:
    """Block lists for all queries of a call, in chunks of some thousand queries.

    The lists equal the selection of `rtpurbo.ops.eager.selection.select_per_query_block` under `row_peak`, except
    for blocks whose maximum is within fp16 rounding (2**-11 of the score) of the threshold.

    Args:
        index_queries: [batch, num_retrieval_heads, q_len, index_dim].
        states: KV cache with index keys.
        table: retrieval heads, with their near windows.
        starts: int32 [batch], position of the first query.
        near_log_sum_exp: fp32 [batch, num_attention_heads, q_len], natural log-sum-exp of the near keys.
        rule: `row_share`, `block_size` and `query_block_size`.

    Yields:
        Index of the first query of the lists, and the lists.
    """
    assert states.index_keys is not None
    key_heads = index_key_heads(states.index_keys, states.keys.shape[1], table.key_value_heads)
    # float8 index keys are converted to the queries' dtype: a prompt reads each of them many times.
    index_keys = states.index_keys.to(index_queries.dtype)
    batch, heads, q_len, index_dim = index_queries.shape
    M, N, stride = rule.query_block_size, rule.block_size, rule.row_stride
    lanes = M // stride
    group = max(1, 128 // N)
    # The interpreter runs no inline assembly.
    packed = index_keys.dtype == torch.float16 and not knobs.runtime.interpret

    def blocks_within_scratch(bytes_per_block: int) -> int:
        return max(1, min(SCRATCH // max(1, bytes_per_block), triton.cdiv(q_len, M)))

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(batch, heads, *shape, dtype=dtype, device=index_queries.device)

    blocks = triton.cdiv(states.capacity, N)
    ranges = triton.cdiv(blocks, RANGE)
    edge = edge_slots(rule)
    width = edge + blocks
    I = max(16, triton.next_power_of_2(index_dim))
    list_blocks = blocks_within_scratch(batch * heads * (blocks + 4 * width))
    score_blocks = min(list_blocks, blocks_within_scratch(batch * heads * blocks * lanes * 2))
    peaks = empty(score_blocks, blocks, lanes, dtype=torch.float16)
    sums = empty(score_blocks, ranges, lanes, dtype=torch.float32)
    for query_offset in range(0, q_len, list_blocks * M):
        tiles = min(list_blocks, triton.cdiv(q_len - query_offset, M))
        flags = empty(tiles, blocks, dtype=torch.int8)
        lists = empty(tiles, width, dtype=torch.int32)
        counts = empty(tiles, 2, dtype=torch.int32)
        for tile in range(0, tiles, score_blocks):
            scored = min(score_blocks, tiles - tile)
            first_query = query_offset + tile * M
            thresholds = empty(scored, lanes, dtype=torch.float32)
            block_maxima_kernel[(scored * ranges, batch * heads)](
                index_queries, index_keys, key_heads, peaks, sums,
                table.windows, starts, states.first_slots,
                q_len, heads, ranges, first_query, index_dim, rule.num_sink_tokens,
                *index_queries.stride()[:3], *index_keys.stride()[:3],
                *peaks.stride()[:4], *sums.stride()[:4],
                STAGES=3, PACKED=packed, STRIDE=stride, M=M, N=N, R=RANGE, G=group, I=I, num_warps=4,
            )  # fmt: skip
            thresholds_kernel[(scored, batch * heads)](
                sums, near_log_sum_exp, thresholds, table.heads, table.windows, starts,
                q_len, heads, first_query, math.log(rule.row_share),
                *sums.stride()[:4], *near_log_sum_exp.stride()[:2],
                STRIDE=stride, M=M, N=N, R=RANGE, num_warps=4,
            )  # fmt: skip
            flags_kernel[(scored * ranges, batch * heads)](
                peaks, thresholds, flags, table.windows, starts,
                q_len, heads, ranges, first_query, blocks, tile, tiles,
                *peaks.stride()[:4], LANES=lanes, M=M, N=N, R=RANGE, num_warps=4,
            )  # fmt: skip
        lists_kernel[(tiles, batch * heads)](
            flags, lists, counts, table.windows, starts,
            q_len, heads, query_offset, blocks, width, rule.num_sink_tokens,
            EDGE=edge, M=M, N=N, C=1024, num_warps=4,
        )  # fmt: skip
        yield query_offset, BlockLists(lists, counts, edge, N, M)


def far_keys(
    lists: BlockLists,
    starts: Tensor,
    table: HeadTable,
    query_offset: int,
    q_len: int,
    rule: AttentionRule,
) -> tuple[float, float, int]:
    """Counts for `SelectionStatistics`: far keys, far keys on the lists, queries with far keys."""
    tiles, size, device = lists.blocks.shape[2], lists.block_size, lists.blocks.device
    valid = lists.valid()
    query_indices = query_offset + torch.arange(tiles * lists.query_block_size, device=device)
    # [batch, heads, queries]: last far key of each query; before the first one if there is none.
    last = starts[:, None, None] + query_indices - table.windows[None, :, None]
    last = last.masked_fill(query_indices >= q_len, -1)
    counts = (last - rule.num_sink_tokens + 1).clamp(min=0)
    read = 0
    for tile in range(tiles):
        blocks = lists.blocks[:, :, tile, None] * size
        tile_last = last[
            :, :, tile * lists.query_block_size : (tile + 1) * lists.query_block_size, None
        ]
        keys = torch.minimum(tile_last + 1, blocks + size) - blocks.clamp(min=rule.num_sink_tokens)
        read += int((keys.clamp(min=0) * valid[:, :, tile, None]).sum())
    return float(counts.sum()), float(read), int((counts > 0).sum())


def edge_slots(rule: AttentionRule) -> int:
    """Capacity of a list for blocks that need a mask, an even number."""
    sinks = triton.cdiv(rule.num_sink_tokens, rule.block_size)
    window_edge = triton.cdiv(rule.query_block_size, rule.block_size) + 1
    return 2 * triton.cdiv(sinks + window_edge + 1, 2)

"""The prefill kernels equal the fp64 oracle: windows of every head, and blocks from lists."""

import numpy as np
import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout
from rtpurbo.ops.triton.heads import HeadTable
from rtpurbo.ops.triton.prefill.portable import block_sparse_attention, window_attention
from rtpurbo.ops.triton.prefill.scoring import block_lists
from tests import oracles
from tests.ops.triton.support import (
    DEVICE,
    DTYPES,
    ON_GPU,
    assert_as_exact_as_eager,
    kernel_problem,
    on_cpu,
    slotted,
)

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("q_len", "k_len", "padding"),
    [(1, 1, (0,)), (63, 63, (0,)), (129, 129, (0, 17)), (50, 257, (0, 0, 230))],
    ids=str,
)
@pytest.mark.parametrize(
    ("heads", "key_value_heads", "head_dim"),
    [
        (4, 4, 16),
        (6, 2, 24),
        *([(6, 2, 64), (3, 1, 96), (4, 2, 128), (2, 1, 256)] if ON_GPU else []),
    ],
    ids=str,
)
def test_windows_of_every_head(dtype, q_len, k_len, padding, heads, key_value_heads, head_dim):
    windows = [1, 16, 40, 100, 1000, 64][:heads]
    problem = kernel_problem(
        q_len, k_len, dtype,
        padding=padding, heads=heads, key_value_heads=key_value_heads, head_dim=head_dim,
    )  # fmt: skip
    layout = HeadLayout.build(range(heads), heads, key_value_heads, DEVICE)
    states = slotted(problem.states(layout.full_key_value_heads), padding)
    table = HeadTable.build(layout.retrieval, torch.tensor(windows, device=states.keys.device))
    output = torch.full_like(problem.queries, torch.nan)
    log_sum_exp = torch.full(output.shape[:3], torch.nan, device=output.device)
    window_attention(
        problem.queries,
        [(states, table)],
        states.query_starts(q_len),
        3,
        problem.scaling,
        output,
        log_sum_exp,
    )
    mask = oracles.near_keys(problem, windows, 3)
    assert_as_exact_as_eager(problem, mask, output, log_sum_exp)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("row_share", "row_stride"), [(0.02, 1), (0.1, 2), (0.4, 1)])
@pytest.mark.parametrize(
    ("q_len", "k_len", "padding"),
    [(200, 200, (0,)), (70, 333, (0, 41)), (129, 129, (100, 3))],
    ids=str,
)
@pytest.mark.parametrize("shared_index", [False, True])
def test_block_lists_and_block_sparse_attention(
    dtype, row_share, row_stride, q_len, k_len, padding, shared_index
):
    rule = AttentionRule(
        num_sink_tokens=3, min_tokens=0, sliding_window=40, block_size=16, query_block_size=32,
        prefill_mode="row_peak", row_share=row_share, row_stride=row_stride, retrieval_window=24,
    )  # fmt: skip
    problem = kernel_problem(
        q_len, k_len, dtype, padding=padding, index_dim=4, shared_index=shared_index
    )
    layout = HeadLayout.build((0, 1, 3), 4, 2, DEVICE)
    states = slotted(problem.states(layout.full_key_value_heads, layout.retrieval.heads), padding)
    index_queries = problem.index_queries[:, layout.retrieval.heads]
    table = HeadTable.build(layout.retrieval, rule.near_window)
    starts = states.query_starts(q_len)
    output = torch.full_like(problem.queries, torch.nan)
    sums = torch.full(output.shape[:3], torch.nan, device=output.device)
    window_attention(problem.queries, [(states, table)], starts, 3, problem.scaling, output, sums)
    listed = torch.zeros(len(padding), 3, -(-q_len // 32), -(-k_len // 16), dtype=torch.bool)
    chunks = block_lists(index_queries, states, table, starts, sums.clone(), rule)
    for row, lists in chunks:
        mark(listed[:, :, row // 32 :], lists)
        block_sparse_attention(
            problem.queries, states, table, starts, lists, row, 3, problem.scaling, output, sums
        )
    heads = layout.retrieval.heads.cpu()
    near = oracles.near_keys(problem, rule.near_window, 3)
    far = oracles.visible_keys(problem) & ~near
    in_list = spread(listed, problem, 32, 16) & far[:, heads]
    expected = oracles.retrieval_keys(on_cpu(problem), rule)[:, heads] & far[:, heads]
    # The lists are the reference's, but for peaks within rounding of the bar.
    assert (in_list != expected).float().mean() < 0.01
    mask = near.clone()
    mask[:, heads] |= in_list
    kept = oracles.replace(
        problem, queries=problem.queries[:, heads], keys=problem.keys[:, problem.kv_head_index[heads]],
        values=problem.values[:, problem.kv_head_index[heads]],
    )  # fmt: skip
    assert_as_exact_as_eager(kept, mask[:, heads], output[:, heads], sums[:, heads])


def mark(listed, lists):
    """Sets the blocks of the lists in bool [batch, heads, tiles, blocks]."""
    for place in np.ndindex(*lists.counts.shape[:3]):
        edge, whole = lists.counts[place].tolist()
        entries = lists.blocks[place]
        assert edge <= lists.edge_slots
        assert whole % 2 == 0
        chosen = [*entries[:edge], *entries[lists.edge_slots : lists.edge_slots + whole]]
        assert len(set(map(int, chosen))) == edge + whole
        listed[(*place, torch.tensor(chosen, dtype=torch.long))] = True


def spread(listed, problem, tile_size, block_size):
    """The keys in the blocks of each query: bool [batch, heads, q_len, k_len]."""
    tiles = torch.arange(problem.queries.shape[2]) // tile_size
    blocks = problem.key_positions.cpu().clamp(min=0) // block_size
    rows = listed[:, :, tiles]
    return rows.gather(-1, blocks[:, None, None].expand(*rows.shape[:3], -1))

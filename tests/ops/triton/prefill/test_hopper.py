"""Hopper's prefill kernels equal the fp64 oracle, and the portable kernels on long sequences."""

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout
from rtpurbo.ops.states import PagedStates
from rtpurbo.ops.triton.heads import HeadTable
from rtpurbo.ops.triton.headwise import head_tables
from rtpurbo.ops.triton.prefill import hopper, portable
from rtpurbo.ops.triton.prefill.scoring import block_lists
from tests import oracles
from tests.ops.triton.support import (
    DEVICE,
    DTYPES,
    assert_as_exact_as_eager,
    kernel_problem,
    slotted,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not hopper.is_hopper(), reason="needs a Hopper GPU"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("q_len", "k_len", "padding"),
    [(2, 2, (0,)), (63, 63, (0,)), (129, 129, (0, 17)), (300, 300, (0,)), (90, 500, (0, 0, 430))],
    ids=str,
)
def test_windows_of_every_head(dtype, head_dim, q_len, k_len, padding):
    windows = [1, 16, 128, 200, 2**30, 64]
    problem = kernel_problem(
        q_len, k_len, dtype, padding=padding, heads=6, key_value_heads=2, head_dim=head_dim
    )
    layout = HeadLayout.build(range(6), 6, 2, DEVICE)
    states = slotted(problem.states(layout.full_key_value_heads), padding)
    table = HeadTable.build(layout.retrieval, torch.tensor(windows, device=DEVICE))
    halves = [
        HeadTable(table.heads[part], table.key_value_heads[part], table.windows[part])
        for part in (slice(0, 4), slice(4, 6))
    ]
    output = torch.full_like(problem.queries, torch.nan)
    sums = torch.full(output.shape[:3], torch.nan, device=DEVICE)
    hopper.window_attention(
        problem.queries,
        [(states, half) for half in halves],
        states.query_starts(q_len),
        3,
        problem.scaling,
        output,
        sums,
    )
    mask = oracles.near_keys(problem, windows, 3)
    assert_as_exact_as_eager(problem, mask, output, sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("page_sizes", [(16, 64), (128, 32), (64, 16)], ids=str)
@pytest.mark.parametrize("num_sinks", [3, 130])
def test_packed_queries_over_pages(dtype, head_dim, page_sizes, num_sinks):
    """Free slots are NaN: blocks between sinks and window, and the ends of last blocks."""
    window = 200
    lengths, counts = (900, 333, 450, 130), (260, 0, 97, 130)
    most = max(lengths)
    generator = torch.Generator(DEVICE).manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE).to(dtype)

    queries = normal(1, sum(counts), 6, head_dim).transpose(1, 2)
    keys, values = normal(4, 2, most, head_dim), normal(4, 2, most, head_dim)
    layout = HeadLayout.build((1, 2), 6, 2, DEVICE)
    tables = head_tables(layout, AttentionRule(sliding_window=window, num_sink_tokens=num_sinks))
    numbers = [torch.tensor(part, dtype=torch.int32, device=DEVICE) for part in (lengths, counts)]
    starts, offsets = numbers[0] - numbers[1], numbers[1].cumsum(0, dtype=torch.int32) - numbers[1]
    sources = []
    for head, (page_size, name) in enumerate(
        zip(page_sizes, ("dense_and_local_full", "local_windowed"), strict=True)
    ):
        num_pages = -(-most // page_size)
        pages = torch.full(
            (2, 4 * num_pages + 1, 1, page_size, head_dim), torch.nan, device=DEVICE, dtype=dtype
        )
        table = (
            torch.randperm(4 * num_pages, generator=generator, device=DEVICE).view(4, -1).int() + 1
        )
        for sequence, length in enumerate(lengths):
            for page in range(-(-length // page_size)):
                first, end = page * page_size, min(length, (page + 1) * page_size)
                is_seen = end > int(starts[sequence]) - window + 1 or first < num_sinks
                if head == 1 and not is_seen:
                    table[sequence, page] = 0
                    continue
                for kind, states in enumerate((keys, values)):
                    place = pages[kind, table[sequence, page], 0]
                    place[: end - first] = states[sequence, head, first:end]
        sources.append((PagedStates(*pages, table, numbers[0]), tables[name]))
    output = torch.full_like(queries, torch.nan)
    sums = torch.full(queries.shape[:3], torch.nan, device=DEVICE)
    packed = portable.PackedQueries(offsets, numbers[1], max(counts))
    assert all(hopper.supports_pages(queries, states) for states, _ in sources)
    arguments = (starts, num_sinks, head_dim**-0.5)
    hopper.window_attention(queries, sources, *arguments, output, sums, packed)
    for sequence, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        rows = slice(int(offsets[sequence]), int(offsets[sequence]) + count)
        for head in range(6):
            query, key = torch.arange(length - count, length)[:, None], torch.arange(length)
            reads = (key > query - window) | (key < num_sinks) | torch.tensor(head in (1, 2))
            mask = ((key <= query) & reads).to(DEVICE)
            scores = queries[0, head, rows].double() @ keys[sequence, head // 3, :length].double().T
            scores = (scores * head_dim**-0.5).masked_fill(~mask, -torch.inf)
            expected = scores.softmax(-1) @ values[sequence, head // 3, :length].double()
            torch.testing.assert_close(
                output[0, head, rows].double(), expected, atol=0.02, rtol=0.02
            )
            torch.testing.assert_close(
                sums[0, head, rows].double(), scores.logsumexp(-1), atol=1e-2, rtol=1e-3
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("row_share", [0.01, 0.1])
@pytest.mark.parametrize(
    ("q_len", "k_len", "padding"), [(2000, 2000, (0, 333)), (700, 4097, (0,))], ids=str
)
def test_lists_equal_the_portable_kernel(dtype, head_dim, row_share, q_len, k_len, padding):
    rule = AttentionRule(
        sliding_window=64, retrieval_window=100, prefill_mode="row_peak", row_share=row_share
    )
    generator = torch.Generator(DEVICE).manual_seed(1)

    def normal(heads, length, size):
        shape = (len(padding), heads, length, size)
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)

    queries, keys, values = (
        normal(4, q_len, head_dim),
        normal(2, k_len, head_dim),
        normal(2, k_len, head_dim),
    )
    layout = HeadLayout.build((0, 1, 3), 4, 2, DEVICE)
    positions = oracles.left_padded_positions(padding, k_len).to(DEVICE)
    states = oracles.KeyValueStates(keys, values, positions, normal(3, k_len, 16))
    states = slotted(states, padding)
    table = HeadTable.build(layout.retrieval, rule.near_window)
    starts = states.query_starts(q_len)
    index_queries = normal(3, q_len, 16)
    near_output = torch.zeros_like(queries)
    near_sums = torch.zeros(queries.shape[:3], device=DEVICE)
    portable.window_attention(queries, [(states, table)], starts, 4, 0.1, near_output, near_sums)
    chunks = list(block_lists(index_queries, states, table, starts, near_sums, rule))
    assert sum(int(lists.counts.sum()) for _, lists in chunks) > 0
    results = []
    for kernels in (hopper, portable):
        output, sums = near_output.clone(), near_sums.clone()
        for row, lists in chunks:
            kernels.block_sparse_attention(
                queries, states, table, starts, lists, row, 4, 0.1, output, sums
            )
        results.append((output, sums))
    assert (results[0][1] > near_sums + 1e-3).any()
    torch.testing.assert_close(results[0][1], results[1][1], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(results[0][0], results[1][0], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kernels", [hopper, portable], ids=["hopper", "portable"])
def test_a_million_tokens_of_many_heads_are_addressed(kernels):
    """2**32 elements of queries: offsets of 32 bits would wrap around."""
    length, heads, head_dim = 2**20 + 65, 32, 128
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(heads):
        shape = (1, heads, length, head_dim)
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.bfloat16)

    queries, keys, values = normal(heads), normal(4), normal(4)
    positions = torch.arange(length, device=DEVICE)[None]
    states = oracles.KeyValueStates(keys, values, positions, in_order=True)
    layout = HeadLayout.build(range(heads), heads, 4, DEVICE)
    table = HeadTable.build(layout.retrieval, 300)
    output = torch.full_like(queries, torch.nan)
    kernels.window_attention(
        queries, [(states, table)], states.query_starts(length), 4, 0.1, output, None
    )
    assert not output[:, -1].isnan().any()
    rows = slice(-70, None)
    seen = torch.cat([torch.arange(4, device=DEVICE), positions[0, -400:]])
    for head in (0, 31):
        scores = queries[0, head, rows].double() @ keys[0, head // 8, seen].double().T * 0.1
        last = positions[0, rows, None]
        visible = (seen <= last) & ((seen > last - 300) | (seen < 4))
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        expected = weights @ values[0, head // 8, seen].double()
        torch.testing.assert_close(output[0, head, rows].double(), expected, atol=0.02, rtol=0.02)

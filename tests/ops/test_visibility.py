"""Visibility masks, keys within reach, and chunks of queries."""

from itertools import combinations_with_replacement

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtpurbo.ops.eager import visibility
from rtpurbo.ops.eager.visibility import causal_mask, keys_in_reach, near_mask, query_chunks
from tests.oracles import left_padded_positions, near_keys, random_problem, visible_keys

LENGTHS = [1, 63, 111, 129]


@pytest.mark.parametrize(("q_len", "k_len"), list(combinations_with_replacement(LENGTHS, 2)))
def test_causal_mask_is_the_definition(q_len, k_len):
    problem = random_problem(q_len, k_len, padding=(0, k_len // 2), heads=2, key_value_heads=1)
    mask = causal_mask(problem.query_positions, problem.key_positions)
    assert torch.equal(mask.expand(-1, 2, -1, -1), visible_keys(problem))


@pytest.mark.parametrize("windows", [1, 16, 200, [1, 7, 64, 200]])
@pytest.mark.parametrize("sinks", [0, 3])
def test_near_mask_is_the_definition(sinks, windows):
    problem = random_problem(40, 63, padding=(0, 9, 63))
    given_windows = windows if isinstance(windows, int) else torch.tensor(windows)
    mask = near_mask(problem.query_positions, problem.key_positions, given_windows, sinks)
    assert torch.equal(mask.expand(-1, 4, -1, -1), near_keys(problem, windows, sinks))


def test_padding_attends_to_nothing_and_is_never_attended_to():
    positions = left_padded_positions([4], 9)
    for mask in (causal_mask(positions, positions), near_mask(positions, positions, 100, 100)):
        assert not mask[..., :4, :].any()
        assert not mask[..., :4].any()
        assert mask[0, 0, -1].sum() == 5


@given(
    k_len=st.integers(1, 80),
    q_len=st.integers(1, 8),
    padding=st.lists(st.integers(0, 80), min_size=1, max_size=3),
    window=st.integers(1, 12),
    sinks=st.integers(0, 3),
)
@settings(max_examples=60)
def test_keys_out_of_reach_are_near_to_no_query(k_len, q_len, padding, window, sinks):
    positions = left_padded_positions(padding, k_len)
    queries = positions[:, -q_len:]
    reach = keys_in_reach(queries, positions, window, sinks)
    touched = near_mask(queries, positions, window, sinks).any((0, 1, 2)).nonzero()[:, 0]
    if reach is not None:
        assert set(touched.tolist()) <= set(reach.tolist())
        assert reach.tolist() == sorted(set(reach.tolist()))


@pytest.mark.parametrize("padding", [[0], [0, 98], [0, 99]])
def test_reach_leaves_far_keys_and_padding_out(padding):
    positions = left_padded_positions(padding, 100)
    reach = keys_in_reach(positions[:, -2:], positions, 8, 4)
    assert reach.tolist() == [*range(4), *range(91, 100)]


def test_padding_after_the_queries_does_not_widen_their_reach():
    positions = left_padded_positions([0], 100)
    reach = keys_in_reach(torch.tensor([[98, 99, -1]]), positions, 8, 4)
    assert reach.tolist() == [*range(4), *range(91, 100)]


@given(queries=st.integers(1, 300), elements=st.integers(1, 50), multiple=st.integers(1, 40))
@settings(max_examples=60)
def test_chunks_cover_the_queries_once_in_whole_multiples(queries, elements, multiple):
    limit = visibility.MAX_CHUNK_ELEMENTS
    visibility.MAX_CHUNK_ELEMENTS = 500
    try:
        chunks = list(query_chunks(queries, elements, multiple))
    finally:
        visibility.MAX_CHUNK_ELEMENTS = limit
    covered = [row for chunk in chunks for row in range(chunk.start, chunk.stop)]
    assert covered == list(range(queries))
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert all(size % multiple == 0 for size in sizes[:-1])
    assert all(size * elements <= 500 or size <= multiple for size in sizes)

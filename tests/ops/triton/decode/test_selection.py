"""Selections of a decode step, held between the bounds that the quantisation of scores leaves open."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout
from rtpurbo.ops.triton.decode import (
    histogram,
    selected_attention,
    window_and_scores,
    workspace,
)
from rtpurbo.ops.triton.decode import top_p as top_p_selection
from tests import oracles
from tests.ops.triton.decode_support import Step
from tests.ops.triton.support import DEVICE

pytestmark = pytest.mark.kernels

WIDTH = histogram.LEVEL_WIDTH.value
FINE_DEPTH = (histogram.FINE_CELLS.value - 1) * WIDTH
COARSE_WIDTH = histogram.COARSE_STEP.value * WIDTH
RULE = AttentionRule(num_sink_tokens=2, sliding_window=16, block_size=8, min_tokens=0, top_p=0.7)


def log_sum_exp(values):
    peak = values.max(initial=-math.inf)
    return peak if peak == -math.inf else peak + math.log(np.exp(values - peak).sum())


def scores_of_entries(scores, kept, positions, block):
    """Log of the mass of each token, or block of tokens, of which only `kept` ones count."""
    scores = np.where(kept, scores, -math.inf)
    entries = [scores[positions // block == entry] for entry in range(positions.max() // block + 1)]
    return np.array([log_sum_exp(entry) for entry in entries])


def mass_in_fp32(scores):
    """Masses beside the largest one; 0 where fp32 has none."""
    return np.exp(np.maximum(scores - scores.max(), -200)).astype(np.float32)


def sums_above(thresholds, keys, values):
    """Sums of the values whose keys are above each threshold."""
    order = np.argsort(-keys)
    sums = np.concatenate([[0.0], np.cumsum(values[order])])
    return sums[np.searchsorted(-keys[order], -thresholds)]


class Estimates:
    """Bounds of the entries' masses: by their levels, and by the coarse cells far below the best."""

    def __init__(self, scores):
        self.scores, self.size = scores, np.ones(len(scores))
        best = scores.max()
        self.counted_at = scores - np.where(scores < best - FINE_DEPTH, COARSE_WIDTH, 0.0)
        self.least = np.exp(self.counted_at - best - 0.51 * WIDTH)
        self.most = np.exp(scores - best + 0.51 * WIDTH)

    def needed(self, near, share):
        """Entries before which the mass read surely is too little, and those before which it may be.

        Too little: with that of `near` keys, relative to the best entry's, it is less than the share.
        """
        read = sums_above(self.scores - 0.01 * WIDTH, self.scores, self.most)
        left = self.least.sum() - sums_above(self.scores - 0.01 * WIDTH, self.scores, self.least)
        surely = (1 - share) * (read + 1.001 * near) < share * left
        read = sums_above(self.scores + 1.01 * WIDTH, self.counted_at, self.least)
        left = self.most.sum() - sums_above(self.scores + 1.01 * WIDTH, self.counted_at, self.most)
        return surely, (1 - share) * (read + 0.999 * near) < share * left

    def top_k(self, count):
        """Entries that surely are among so many, and those that may be."""
        surely = sums_above(self.scores - 0.01 * WIDTH, self.scores, self.size) <= count
        return surely, sums_above(self.scores + 1.01 * WIDTH, self.counted_at, self.size) < count


def bounds(step, row, head):
    """Entries that must be selected for a sequence and a head, and those that may be."""
    rule, problem = step.rule, step.problem
    positions = problem.key_positions[row].numpy()
    real = positions >= 0
    near = oracles.near_keys(problem, rule.near_window, rule.num_sink_tokens)[row, head, 0].numpy()
    far = step.far()[row, head, 0].numpy()[real]
    near, positions = near[real], positions[real]
    if not far.any():
        return set(), set()
    block = rule.block_size if rule.granularity == "block" else 1
    keys = problem.index_keys[row, head].double().numpy()[real]
    index = keys @ problem.index_queries[row, head, 0].double().numpy()
    far_scores = scores_of_entries(index, far, positions, block)
    judged, near_mass, shares = Estimates(far_scores), 0.0, (rule.top_p, rule.top_p)
    if rule.reading == "paper":
        judged = Estimates(scores_of_entries(index, near | far, positions, block))
    else:
        exact = oracles.exact_logits(problem)[row, head, 0].numpy()[real]
        near_mass = math.exp(min(700.0, log_sum_exp(exact[near]) - far_scores.max()))
    if rule.reading == "far":
        least = near_mass * rule.far_floor / (1 - rule.far_floor)
        shares = [rule.top_p * (mass.sum() > least) for mass in (judged.least, judged.most)]
        near_mass = 0.0
    must, may = (judged.needed(near_mass, share)[which] for which, share in enumerate(shares))
    floor_must, floor_may = Estimates(far_scores).top_k(-(-rule.min_tokens // block))
    has_mass = mass_in_fp32(far_scores) > 0
    return tuple(
        set(np.flatnonzero(entries & has_mass).tolist())
        for entries in (must | floor_must, may | floor_may)
    )


def check_bounds(step):
    """The selection contains what it must and nothing that it must not; returns how many entries."""
    _, _, selection = step.run()
    block = step.rule.block_size if step.rule.granularity == "block" else 1
    keys = step.selected(selection)
    total = 0
    for row, rank in np.ndindex(*keys.shape[:2]):
        positions = step.problem.key_positions[row][keys[row, rank, 0]]
        chosen = set((positions // block).tolist())
        must, may = bounds(step, row, int(step.layout.retrieval.heads[rank]))
        assert must <= chosen, "an entry is missing"
        assert chosen <= may, "an entry is too weak"
        total += len(chosen)
    return total


@given(
    k_len=st.integers(1, 260),
    padding=st.integers(0, 30),
    top_p=st.floats(0.05, 0.995),
    reading=st.sampled_from(["residual", "far", "paper"]),
    granularity=st.sampled_from(["token", "block"]),
    min_tokens=st.sampled_from([0, 1, 10, 1000]),
    window=st.sampled_from([None, 1, 50]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_a_selection_is_the_exact_one_rounded_to_levels(
    k_len, padding, top_p, reading, granularity, min_tokens, window, seed
):
    rule = replace(
        RULE,
        top_p=top_p,
        reading=reading,
        granularity=granularity,
        min_tokens=min_tokens,
        retrieval_window=window,
    )
    padding = (0, min(padding, k_len))
    check_bounds(Step.build(k_len, rule, dtype=torch.float32, padding=padding, seed=seed))


@pytest.mark.parametrize("granularity", ["token", "block"])
@pytest.mark.parametrize("reading", ["residual", "far", "paper"])
def test_heads_that_share_index_keys_select_by_their_own_queries(granularity, reading):
    rule = replace(RULE, granularity=granularity, reading=reading, min_tokens=10)
    shape = {"heads": 12, "key_value_heads": 2, "shared_index": True}
    step = Step.build(1100, rule, (0, 6, 7, 11), dtype=torch.float32, padding=(0, 301), **shape)
    assert check_bounds(step) > 0
    first, second = step.selected(step.run()[2])[:, 1:3].unbind(1)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("granularity", ["token", "block"])
def test_many_programs_share_a_head(granularity):
    rule = replace(RULE, granularity=granularity, min_tokens=100, reading="far")
    step = Step.build(4200, rule, (0,), dtype=torch.float32, heads=1, key_value_heads=1)
    assert check_bounds(step) >= 100 // (8 if granularity == "block" else 1)
    step.check()


# Keys 12 nats below another one of their chunk are counted up to 3 nats lower than they are.
@pytest.mark.parametrize(("scale", "fewest", "most"), [(3.0, 20, 40), (8.0, 20, 50), (100.0, 1, 1)])
def test_the_floor_reaches_far_below_the_peak_but_not_to_keys_without_mass(scale, fewest, most):
    rule = replace(RULE, min_tokens=20)
    step = Step.build(250, rule, (0,), dtype=torch.float32)
    query = step.problem.index_queries[:, :1]
    step.problem.index_keys[:, 0, 100] = scale * query[:, 0, 0]
    step.arguments[1].index_keys[:, 0, 100] = scale * query[:, 0, 0].to(DEVICE)
    assert fewest <= check_bounds(step) <= most


@pytest.mark.parametrize("reading", ["residual", "far", "paper"])
def test_equal_scores_are_selected_together(reading):
    rule = replace(RULE, reading=reading, top_p=0.9, min_tokens=5)
    step = Step.build(200, rule, (0,), dtype=torch.float32)
    step.problem.index_queries.zero_()
    step.arguments[4].zero_()
    assert check_bounds(step) == 200 - 2 - 16


@pytest.mark.parametrize("granularity", ["token", "block"])
@pytest.mark.parametrize("reading", ["residual", "paper"])
@pytest.mark.parametrize("heads", [(0, 3), (0, 1, 3)], ids=str)
def test_the_result_does_not_depend_on_the_division_of_work(
    monkeypatch, reading, granularity, heads
):
    rule = replace(RULE, granularity=granularity, reading=reading, min_tokens=50)
    shape = {"padding": (0, 700), "key_value_heads": 2, "shared_index": len(heads) > 2}
    step = Step.build(1500, rule, heads, dtype=torch.float32, **shape)
    check_bounds(step)
    for module, name, size in (
        (workspace, "CHUNK_TOKENS", 256),
        (workspace, "SEGMENTS", 3),
        (workspace, "MIN_SEGMENT_ENTRIES", 16),
        (top_p_selection, "COMPACTED_ENTRIES", 64),
        (workspace, "MIN_GROUP_SEGMENT_ENTRIES", 16),
        (window_and_scores, "SCORE_PROGRAMS", 1),
        (window_and_scores, "GROUP_SCORES", 256),
        (selected_attention, "TOKENS_PER_PROGRAM", 100),
        (selected_attention, "GROUP_TOKENS", 100),
        (selected_attention, "GROUP_TILE", 16),
    ):
        monkeypatch.setattr(module, name, size)
    check_bounds(step)
    step.check()


@pytest.mark.parametrize("granularity", ["token", "block"])
def test_index_keys_in_float8_lose_little_mass(granularity):
    rule = replace(RULE, reading="far", granularity=granularity, min_tokens=32, top_p=0.9)
    shape = {"head_dim": 32, "index_dim": 16}
    step = Step.build(2000, rule, (0, 3), dtype=torch.float16, padding=(0, 500), **shape)
    full = step.arguments[1]
    rounded = replace(full, index_keys=full.index_keys.to(torch.float8_e4m3fn))
    coarse = step.replaced(
        problem=replace(
            step.problem,
            index_keys=step.problem.index_keys.to(torch.float8_e4m3fn).to(torch.float16),
        ),
        arguments=[step.arguments[0], rounded, *step.arguments[2:]],
    )
    check_bounds(coarse)
    coarse.check()
    heads = step.layout.retrieval.heads
    queries = step.problem.index_queries[:, heads].double()
    scores = queries @ step.problem.index_keys[:, heads].double().mT
    mass = scores.masked_fill(~step.far()[:, heads], -torch.inf).softmax(-1)
    kept, in_float8 = ((mass * one.selected(one.run()[2])).sum(-1) for one in (step, coarse))
    assert (kept > 0.89).all()
    assert (in_float8 > kept - 0.04).all()


@triton.jit
def cells_kernel(cells, deepest, count: tl.constexpr):
    depths = tl.arange(0, count)
    entry_cells = histogram.cell_of(depths)
    tl.store(cells + depths, entry_cells)
    tl.store(deepest + depths, histogram.deepest_of(entry_cells))


def test_histogram_bins_cover_all_mass():
    size = histogram.DEPTH_WIDTH.value
    cells, deepest = torch.empty(2, size, dtype=torch.int32, device=DEVICE)
    cells_kernel[(1,)](cells, deepest, size)
    depths = torch.arange(size, device=DEVICE)
    fine = histogram.FINE_CELLS.value
    assert (cells.diff() >= 0).all()
    assert (deepest >= depths).all()
    assert torch.equal(deepest[:fine].long(), depths[:fine])
    assert (deepest - depths).max() < histogram.COARSE_STEP.value
    assert cells[histogram.DEPTH.value] < histogram.CELLS.value


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["token", "block"])
@pytest.mark.parametrize("reading", ["residual", "far", "paper"])
def test_long_selections_on_a_gpu(reading, granularity):
    rule = AttentionRule(
        sliding_window=512, block_size=64, top_p=0.9, reading=reading, granularity=granularity
    )
    shape = {"heads": 4, "key_value_heads": 1, "head_dim": 128, "index_dim": 16}
    check_bounds(Step.build(9000, rule, dtype=torch.float16, padding=(0, 800), **shape))


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "retrieval_heads", "members"),
    [
        (32, 4, range(8), 8),
        (12, 2, (0, 6, 7, 11), 3),
        (32, 4, (3, 9, 16, 22, 28), 1),
        (8, 4, (0, 2, 5), 1),
        (20, 1, range(18), 1),
        (8, 4, (), 1),
    ],
    ids=str,
)
def test_heads_share_lists_if_a_key_value_head_has_several(
    heads, key_value_heads, retrieval_heads, members
):
    layout = HeadLayout.build(retrieval_heads, heads, key_value_heads)
    groups = workspace.SelectionGroups.of(layout)
    assert groups.members == members
    assert groups.count == (
        len(retrieval_heads) if members == 1 else len(layout.full_key_value_heads)
    )

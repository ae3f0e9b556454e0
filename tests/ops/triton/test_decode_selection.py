"""What a decoding step selects lies between two exact selections that its bins tell apart."""

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
from rtpurbo.ops.triton import decode_histogram
from tests import oracles
from tests.ops.triton.decode_support import Step
from tests.ops.triton.support import DEVICE

WIDTH = decode_histogram.BIN_WIDTH.value
DEPTH = decode_histogram.LINEAR_DEPTH.value
GROWTH = 2 ** (1 / decode_histogram.BINS_PER_DOUBLING.value)
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


def with_odds(share, factor):
    """The share whose odds are so many times those of `share`."""
    if not 0 < share < 1:
        return share
    odds = share / (1 - share) * factor
    return odds / (1 + odds)


def reach(scores, weakest):
    """The lowest score in the bin of an entry, at the most."""
    depth = scores.max() - weakest
    return weakest - (WIDTH if depth < DEPTH - WIDTH else depth * (GROWTH - 1) + WIDTH) * 1.01


def rounded_up(scores, entries):
    """Entries, and all others within a bin of the weakest."""
    if not entries:
        return set()
    weakest = min(scores[entry] for entry in entries)
    return set(np.flatnonzero(scores >= reach(scores, weakest)).tolist())


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
    scores, share = far_scores, rule.top_p
    if rule.reading == "paper":
        scores = scores_of_entries(index, near | far, positions, block)
    else:
        exact = oracles.exact_logits(problem)[row, head, 0].numpy()[real]
        odds = math.exp(log_sum_exp(exact[near]) - log_sum_exp(index[far]))
        if rule.reading == "residual":
            share = rule.top_p - (1 - rule.top_p) * odds
        elif 1 / (1 + odds) <= rule.far_floor:
            share = 0.0
    mass = np.exp(scores - log_sum_exp(scores))
    least = oracles.top_p_set(mass, with_odds(share, math.exp(-1.01 * WIDTH)))
    most = oracles.top_p_set(mass, with_odds(share, math.exp(1.01 * WIDTH)))
    floor = oracles.heaviest(mass_in_fp32(far_scores), -(-rule.min_tokens // block))
    may = rounded_up(scores, most) | rounded_up(far_scores, floor)
    has_far = set(np.flatnonzero(mass_in_fp32(far_scores)).tolist())
    return (least | floor) & has_far, may & has_far


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
@settings(deadline=None, max_examples=25)
def test_a_selection_is_the_exact_one_rounded_to_bins(
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
def test_many_programs_share_a_head(granularity):
    rule = replace(RULE, granularity=granularity, min_tokens=100, reading="far")
    step = Step.build(4200, rule, (0,), dtype=torch.float32, heads=1, key_value_heads=1)
    assert check_bounds(step) >= 100 // (8 if granularity == "block" else 1)
    step.check()


@pytest.mark.parametrize(("scale", "fewest", "most"), [(3.0, 20, 40), (8.0, 20, 40), (100.0, 1, 1)])
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


@triton.jit
def bins_kernel(depths, bins, count: tl.constexpr):
    lanes = tl.arange(0, count)
    tl.store(bins + lanes, decode_histogram.bin_of(tl.load(depths + lanes)))


def test_bins_are_ordered_and_as_wide_as_they_say():
    depths = torch.cat([torch.linspace(0, 40, 4096), torch.linspace(40, 103, 4096)]).to(DEVICE)
    bins = torch.empty_like(depths, dtype=torch.int32)
    bins_kernel[(1,)](depths, bins, len(depths))
    assert bins[0] == 0
    assert (bins.diff() >= 0).all()
    assert bins[-1] < decode_histogram.BINS.value
    for number in bins.unique().tolist():
        inside = depths[bins == number]
        width = WIDTH if inside[0] < DEPTH else inside[0] * (GROWTH - 1)
        assert inside[-1] - inside[0] <= width * 1.001


@pytest.mark.gpu
@pytest.mark.parametrize("granularity", ["token", "block"])
@pytest.mark.parametrize("reading", ["residual", "far", "paper"])
def test_long_selections_on_a_gpu(reading, granularity):
    rule = AttentionRule(
        sliding_window=512, block_size=64, top_p=0.9, reading=reading, granularity=granularity
    )
    shape = {"heads": 4, "key_value_heads": 1, "head_dim": 128, "index_dim": 16}
    check_bounds(Step.build(9000, rule, dtype=torch.float16, padding=(0, 800), **shape))

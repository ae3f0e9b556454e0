"""Dynamic top-p: its sets are minimal, reach their target, grow with p, and blocks cover tokens."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rtpurbo.config import AttentionRule
from rtpurbo.ops import index_scores
from rtpurbo.ops.eager import selection
from rtpurbo.ops.eager.selection import (
    SORTING,
    SetFinder,
    block_ids,
    estimated_logits,
    masses,
    select_per_query,
    select_per_query_block,
    set_finder,
    smallest_set,
    spread_blocks,
    sum_blocks,
    target_mass,
)
from rtpurbo.ops.triton import sets
from tests import oracles
from tests.oracles import random_problem

READINGS = ["paper", "residual", "far"]
RULE = AttentionRule(
    num_sink_tokens=2, sliding_window=6, min_tokens=0, block_size=5, query_block_size=4
)

mass_rows = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1.0)), min_size=1, max_size=12).map(
    lambda row: torch.tensor(row, dtype=torch.float64)
)
rules = st.builds(
    lambda reading, granularity, top_p: replace(
        RULE, reading=reading, granularity=granularity, top_p=top_p
    ),
    st.sampled_from(READINGS),
    st.sampled_from(["token", "block"]),
    st.floats(0.05, 0.99),
)
problems = st.builds(
    lambda padding, q_len, more, seed: random_problem(
        q_len, q_len + more, padding=padding, heads=2, key_value_heads=1, seed=seed
    ),
    st.lists(st.integers(0, 20), min_size=1, max_size=2),
    st.integers(1, 6),
    st.integers(0, 40),
    st.integers(0, 1000),
)
quick = settings(max_examples=60)
BISECTING = SetFinder(sets.top_set, sets.top_k)


def ingredients(problem, rule):
    """Estimated logits, near and far keys, as the retrieval operator computes them."""
    near = oracles.near_keys(problem, rule.sliding_window, rule.num_sink_tokens)
    far = oracles.visible_keys(problem) & ~near
    index = index_scores(problem.index_queries, problem.index_keys)
    logits = estimated_logits(rule.reading, oracles.exact_logits(problem), index, near, far)
    return logits, near, far


def select(problem, rule):
    logits, near, far = ingredients(problem, rule)
    return select_per_query(rule, logits, near, far, problem.key_positions)


@given(row=mass_rows, share=st.floats(-0.2, 1.2))
@example(row=torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64), share=1.2)
@quick
def test_smallest_set_reaches_the_target_with_the_fewest_entries(row, share):
    target = float(row.sum()) * share
    chosen = smallest_set(row, torch.tensor(target, dtype=torch.float64))
    count, slack = int(chosen.sum()), 1e-12
    assert not chosen[row == 0].any()
    if target <= 0:
        assert count == 0
    elif share > 1:
        assert torch.equal(chosen, row > 0)
    else:
        assert row[chosen].sum() >= target - slack
        # No set of one entry fewer reaches it, whichever it is.
        fewer = combinations(row.tolist(), count - 1) if count else []
        assert all(sum(entries) < target + slack for entries in fewer)


@given(row=mass_rows, shares=st.tuples(st.floats(0, 1), st.floats(0, 1)))
@quick
def test_smallest_set_grows_with_the_target(row, shares):
    small, large = (smallest_set(row, row.sum() * share) for share in (min(shares), max(shares)))
    assert not (small & ~large).any()


def test_ties_go_to_the_earlier_entry():
    chosen = smallest_set(torch.tensor([0.1, 0.3, 0.3, 0.3]), torch.tensor(0.5))
    assert chosen.tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("device", "dtype", "has_triton", "expected"),
    [
        ("cuda", torch.float32, True, BISECTING),
        ("cuda", torch.float32, False, SORTING),
        ("cuda", torch.float64, True, SORTING),
        ("cpu", torch.float32, True, SORTING),
    ],
)
def test_sets_are_found_by_a_kernel_on_a_gpu(monkeypatch, device, dtype, has_triton, expected):
    monkeypatch.setattr(selection, "has_triton", lambda: has_triton)
    assert set_finder(torch.device(device), dtype) == expected


@pytest.mark.parametrize("granularity", ["token", "block"])
def test_queries_select_the_same_with_the_kernel(monkeypatch, granularity):
    rule = replace(RULE, granularity=granularity, top_p=0.7, min_tokens=7)
    problem = random_problem(1, 60, padding=(0, 9), heads=2, key_value_heads=1, seed=3)
    expected = select(problem, rule)
    monkeypatch.setattr(selection, "set_finder", lambda device, dtype: BISECTING)
    assert torch.equal(select(problem, rule), expected)
    assert expected.any()


@given(problem=problems, rule=rules)
@quick
def test_queries_select_the_same_as_brute_force(problem, rule):
    expected = oracles.retrieval_keys(problem, replace(rule, prefill_mode="top_p"))
    near = oracles.near_keys(problem, rule.sliding_window, rule.num_sink_tokens)
    assert torch.equal(select(problem, rule), expected & ~near)


@given(
    problem=problems,
    rule=rules,
    row_share=st.floats(0.01, 0.9),
    mode=st.sampled_from(["row_share", "row_peak"]),
)
@quick
def test_query_blocks_select_the_same_as_brute_force(problem, rule, row_share, mode):
    rule = replace(rule, row_share=row_share, prefill_mode=mode)
    if problem.queries.shape[2] == 1:  # one row selects for itself
        rule = replace(rule, prefill_mode="top_p")
    logits, near, far = ingredients(problem, rule)
    if rule.prefill_mode == "top_p":
        selected = select_per_query(rule, logits, near, far, problem.key_positions)
    else:
        selected = select_per_query_block(rule, logits, near, far, problem.key_positions)
    assert torch.equal(selected, oracles.retrieval_keys(problem, rule) & ~near)


@given(problem=problems, rule=rules, other=st.floats(0.05, 0.99))
@quick
def test_selection_grows_with_p(problem, rule, other):
    low, high = sorted((rule.top_p, other))
    fewer, more = (select(problem, replace(rule, top_p=top_p)) for top_p in (low, high))
    assert not (fewer & ~more).any()


@given(problem=problems, rule=rules)
@quick
def test_the_mass_read_reaches_p(problem, rule):
    logits, near, far = ingredients(problem, rule)
    selected = select(problem, rule)
    assert not (selected & ~far).any()
    mass = masses(logits)
    reached = (mass * (near | selected)).sum(-1)
    sees = (near | far).any(-1)
    if rule.reading != "far":
        # Near keys count whole in `residual`; in `paper` they are read whether chosen or not.
        assert (reached[sees] >= rule.top_p - 1e-9).all()
    else:
        far_mass = (mass * far).sum(-1)
        counted = far_mass > rule.far_floor
        missing = rule.top_p * far_mass - (mass * selected).sum(-1)
        assert (missing[counted] <= 1e-9).all()
        assert not selected[~counted].any()


@given(problem=problems, rule=rules)
@quick
def test_blocks_are_whole_and_the_fewest_that_reach_the_target(problem, rule):
    rule = replace(rule, granularity="block")
    logits, near, far = ingredients(problem, rule)
    candidates, target = target_mass(rule, masses(logits), near, far)
    blocks = block_ids(problem.key_positions, rule.block_size)
    block_mass = sum_blocks(candidates, blocks)
    selected = select(problem, rule)
    for batch, head, row in np.ndindex(*selected.shape[:3]):
        ids = blocks[batch]
        chosen = set(ids[selected[batch, head, row]].tolist())
        reachable = set(ids[far[batch, head, row]].tolist())
        # All far keys of a chosen block are read, and no others.
        whole = torch.tensor([int(block) in chosen for block in ids]) & far[batch, head, row]
        assert torch.equal(selected[batch, head, row], whole)
        shares, wanted = block_mass[batch, head, row], float(target[batch, head, row])
        # A block without which the target is out of reach must be in.
        needed = (shares.sum() - shares < wanted - 1e-9) & (shares > 0) & (wanted > 0)
        assert set(needed.nonzero()[:, 0].tolist()) & reachable <= chosen


@given(problem=problems, rule=rules)
@quick
def test_block_lists_cover_token_lists_of_one_key_blocks(problem, rule):
    token = select(problem, replace(rule, granularity="token"))
    block = select(problem, replace(rule, granularity="block", block_size=1))
    assert torch.equal(token, block)


@given(problem=problems, rule=rules)
@quick
def test_a_block_list_reaches_the_mass_of_the_token_list(problem, rule):
    logits, near, far = ingredients(problem, rule)
    candidates, target = target_mass(rule, masses(logits), near, far)
    if rule.reading == "paper":
        target = target - (candidates * near).sum(-1)
    reachable = torch.minimum(target, (candidates * far).sum(-1))
    for granularity in ("token", "block"):
        selected = select(problem, replace(rule, granularity=granularity))
        assert ((candidates * selected).sum(-1) >= reachable - 1e-9).all()


@given(problem=problems, rule=rules, row_share=st.floats(0.01, 0.9))
@quick
def test_a_query_block_reads_the_blocks_of_all_its_queries(problem, rule, row_share):
    rule = replace(rule, row_share=row_share, prefill_mode="row_share")
    logits, near, far = ingredients(problem, rule)
    blocks = block_ids(problem.key_positions, rule.block_size)
    peaks = sum_blocks(masses(logits) * far, blocks) >= row_share
    selected = select_per_query_block(rule, logits, near, far, problem.key_positions)
    assert not (spread_blocks(peaks, blocks) & far & ~selected).any()
    finer = replace(rule, query_block_size=1)
    assert not (
        select_per_query_block(finer, logits, near, far, problem.key_positions) & ~selected
    ).any()


@pytest.mark.parametrize("granularity", ["token", "block"])
def test_residual_selects_nothing_where_the_mass_is_local(granularity):
    rule = replace(RULE, reading="residual", granularity=granularity, top_p=0.9)
    problem = random_problem(1, 40)
    logits, near, far = ingredients(problem, rule)
    logits = torch.where(near, logits + 100, logits)
    assert not select_per_query(rule, logits, near, far, problem.key_positions).any()
    assert select(problem, rule).any()


def test_far_selects_nothing_below_the_floor():
    rule = replace(RULE, reading="far", top_p=0.9)
    near = torch.tensor([[[[False, False, True]]]])
    for far_mass, selects in ((0.04, False), (0.06, True)):
        mass = torch.tensor([[[[far_mass / 2, far_mass / 2, 1 - far_mass]]]])
        positions = torch.tensor([[0, 1, 2]])
        selected = select_per_query(rule, mass.log(), near, ~near, positions)
        assert selected.any() == selects


def test_paper_reads_the_indexer_alone_and_the_others_read_exact_logits_near_by():
    exact, index = torch.full((1, 1, 1, 3), 2.0), torch.full((1, 1, 1, 3), 5.0)
    near = torch.tensor([[[[False, True, False]]]])
    far = torch.tensor([[[[True, False, False]]]])
    hidden = -torch.inf
    expected = {"paper": [5.0, 5.0, hidden], "residual": [5.0, 2.0, hidden]}
    expected["far"] = expected["residual"]
    for reading, logits in expected.items():
        assert estimated_logits(reading, exact, index, near, far).flatten().tolist() == logits


def test_index_scores_are_at_least_fp32():
    states = torch.ones(1, 1, 2, 4, dtype=torch.float16)
    assert index_scores(states, states).dtype == torch.float32


@given(problem=problems, rule=rules, count=st.integers(1, 12))
@quick
def test_every_query_selects_at_least_min_tokens(problem, rule, count):
    floored = replace(rule, min_tokens=count)
    plain, chosen = select(problem, rule), select(problem, floored)
    assert (chosen | plain == chosen).all()
    logits, _, far = ingredients(problem, rule)
    mass = masses(logits) * far
    if rule.granularity == "block":
        count = -(-count // rule.block_size)
        blocks = block_ids(problem.key_positions, rule.block_size)
        mass = sum_blocks(mass, blocks)
        chosen = sum_blocks(chosen.double(), blocks) > 0
    assert (chosen.sum(-1) >= (mass > 0).sum(-1).clamp(max=count)).all()
    # What the floor adds is heavier than what stays out.
    if rule.reading != "paper":
        lightest = mass.masked_fill(~chosen, torch.inf).amin(-1)
        assert (mass.masked_fill(chosen, 0.0).amax(-1) <= lightest).all()

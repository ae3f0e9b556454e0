"""Retrieval heads equal the fp64 oracle in every reading, granularity and prefill mode."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.ops import SelectionStatistics, causal_attention, retrieval_attention
from rtpurbo.ops.eager import visibility
from tests import oracles
from tests.ops.retrieval_support import run
from tests.oracles import random_problem

RULE = AttentionRule(
    num_sink_tokens=2,
    min_tokens=2,
    sliding_window=16,
    block_size=8,
    query_block_size=16,
    top_p=0.7,
    prefill_mode="top_p",
)
RULES = {
    f"{reading}-{granularity}-{mode}": replace(
        RULE, reading=reading, granularity=granularity, prefill_mode=mode
    )
    for reading, granularity, mode in product(
        ("paper", "residual", "far"), ("token", "block"), ("top_p", "row_share", "row_peak")
    )
}
SHAPES = [(1, 1), (1, 63), (63, 63), (1, 129), (31, 111), (129, 129)]


def check(problem, rule):
    mask = oracles.retrieval_keys(problem, rule)
    torch.testing.assert_close(run(problem, rule), oracles.attend(problem, mask))
    return mask


@pytest.mark.parametrize(("q_len", "k_len"), SHAPES)
@pytest.mark.parametrize("name", RULES)
def test_equals_the_oracle(name, q_len, k_len):
    problem = random_problem(q_len, k_len, padding=(0, k_len // 4))
    mask = check(problem, RULES[name])
    if k_len > 100:  # the case must be one where something, but not all, is selected
        near = oracles.near_keys(problem, RULE.sliding_window, RULE.num_sink_tokens)
        assert (mask & ~near).any()
        assert (oracles.visible_keys(problem) & ~mask).any()


@pytest.mark.parametrize(("heads", "key_value_heads"), [(3, 3), (4, 2), (6, 2), (6, 1)])
@pytest.mark.parametrize("name", RULES)
def test_shared_index_keys_equal_the_oracle(name, heads, key_value_heads):
    shape = {"heads": heads, "key_value_heads": key_value_heads, "shared_index": True}
    problem = random_problem(31, 111, padding=(0, 27), **shape)
    assert problem.states().index_keys.shape[1] == key_value_heads
    check(problem, RULES[name])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "changes",
    [
        {"top_p": 0.3, "row_share": 0.4},
        {"top_p": 0.999, "row_share": 0.01},
        {"block_size": 5, "query_block_size": 7, "sliding_window": 5, "num_sink_tokens": 0},
        {"far_floor": 0.6},
        {"row_stride": 4},
    ],
    ids=str,
)
def test_equals_the_oracle_whatever_the_sizes(name, changes):
    check(random_problem(20, 70, padding=(3,), seed=5), replace(RULES[name], **changes))


@pytest.mark.parametrize("name", RULES)
def test_keys_may_be_in_any_order(name):
    problem = random_problem(17, 63, padding=(0, 13))
    order = torch.randperm(63, generator=torch.Generator().manual_seed(1))
    shuffled = problem.key_order(order)
    check(shuffled, RULES[name])
    torch.testing.assert_close(run(shuffled, RULES[name]), run(problem, RULES[name]))


@pytest.mark.parametrize("name", RULES)
def test_chunked_equals_unchunked(name, monkeypatch):
    problem = random_problem(63, 111, padding=(0, 30))
    whole = run(problem, RULES[name])
    monkeypatch.setattr(visibility, "MAX_CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(run(problem, RULES[name]), whole)


@pytest.mark.parametrize("reading", ["paper", "residual", "far"])
@pytest.mark.parametrize("granularity", ["token", "block"])
def test_top_p_of_one_is_dense(reading, granularity):
    problem = random_problem(63, 111, padding=(0, 30))
    dense = causal_attention(
        problem.queries,
        problem.query_positions,
        problem.states(),
        problem.kv_head_index,
        scaling=problem.scaling,
        return_log_sum_exp=True,
    )
    rule = replace(RULE, reading=reading, granularity=granularity, top_p=1.0)
    torch.testing.assert_close(run(problem, rule), dense)


@pytest.mark.parametrize("name", RULES)
def test_permuting_the_batch_commutes(name):
    problem, order = random_problem(33, 63, padding=(0, 13, 40)), [2, 0, 1]
    output, log_sum_exp = run(problem, RULES[name])
    permuted = run(problem.rows(order), RULES[name])
    torch.testing.assert_close(permuted, (output[order], log_sum_exp[order]))


@pytest.mark.parametrize("name", RULES)
def test_a_batch_equals_its_sequences_one_by_one(name):
    problem = random_problem(33, 63, padding=(0, 13, 40))
    output, _ = run(problem, RULES[name])
    singles = torch.cat([run(problem.rows([row]), RULES[name])[0] for row in range(3)])
    torch.testing.assert_close(output, singles)


@pytest.mark.parametrize("name", RULES)
def test_poisoned_padding_does_not_leak(name):
    problem = random_problem(33, 63, padding=(0, 13))
    expected = run(problem, RULES[name])
    hidden = (problem.key_positions < 0)[:, None, :, None]
    problem.keys = problem.keys.masked_fill(hidden, torch.nan)
    problem.index_keys = problem.index_keys.masked_fill(hidden, torch.nan)
    # Finite: 0 * NaN is NaN, so values of padding must be finite (as projections of any token are).
    problem.values = problem.values.masked_fill(hidden, 1e30)
    real = (problem.query_positions >= 0)[:, None].expand(-1, 4, -1)
    for actual, wanted in zip(run(problem, RULES[name]), expected, strict=True):
        torch.testing.assert_close(actual[real], wanted[real], rtol=0, atol=0)


@pytest.mark.parametrize("name", RULES)
def test_statistics_count_far_keys_and_those_read(name):
    problem, statistics = random_problem(33, 111, padding=(0, 13)), SelectionStatistics()
    run(problem, RULES[name], statistics=statistics)
    mask = oracles.retrieval_keys(problem, RULES[name])
    near = oracles.near_keys(problem, RULE.sliding_window, RULE.num_sink_tokens)
    far = oracles.visible_keys(problem) & ~near
    assert statistics.far_keys == far.sum()
    assert statistics.far_keys_read == (mask & far).sum()
    assert statistics.queries == far.any(-1).sum()
    assert statistics.share_read == pytest.approx(float((mask & far).sum() / far.sum()))


def test_statistics_of_nothing_have_no_share():
    assert SelectionStatistics().share_read is None


class Watcher(SelectionStatistics):
    """Keeps what it is shown."""

    def add_queries(self, rows, selected):
        self.seen = [*getattr(self, "seen", []), (rows, selected)]


@pytest.mark.parametrize("mode", ["top_p", "row_share"])
@pytest.mark.parametrize("q_len", [1, 33])
def test_a_selector_replaces_the_rule(monkeypatch, mode, q_len):
    monkeypatch.setattr(visibility, "MAX_CHUNK_ELEMENTS", 2 * 4 * 111 * 16)
    problem, watcher = random_problem(q_len, 111, padding=(0, 13)), Watcher()
    near = oracles.near_keys(problem, RULE.sliding_window, RULE.num_sink_tokens)
    even = (problem.key_positions % 2 == 0)[:, None, None]

    def select(rows):
        # Near keys too, and what is not there: neither is for a selector to say.
        return (rows.key_positions % 2 == 0)[:, None, None].expand(rows.logits.shape)

    rule = replace(RULE, prefill_mode=mode)
    actual = run(problem, rule, selector=select, statistics=watcher)
    mask = oracles.visible_keys(problem) & (near | even)
    torch.testing.assert_close(actual, oracles.attend(problem, mask))
    selected = torch.cat([selected for _, selected in watcher.seen], 2)
    assert torch.equal(selected, (mask & ~near).expand(selected.shape))
    rows = watcher.seen[0][0]
    torch.testing.assert_close(rows.logits.exp().log(), rows.logits)
    assert rows.score_index().shape == rows.logits.shape


def test_index_keys_of_another_number_of_heads_are_refused():
    problem = random_problem(5, 60)
    problem.index_keys = problem.index_keys[:, :3]
    with pytest.raises(ValueError, match="index keys have 3 heads: expected 4"):
        run(problem, RULE)


def test_states_without_index_keys_are_refused():
    problem = random_problem(1, 9)
    states = problem.states()
    states.index_keys = None
    with pytest.raises(ValueError, match="index keys"):
        retrieval_attention(
            problem.queries,
            problem.query_positions,
            states,
            problem.kv_head_index,
            problem.index_queries,
            RULE,
            scaling=1.0,
        )

"""A whole layer equals the fp64 oracle for any set of retrieval heads, forward and backward."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout, headwise_attention
from tests import oracles
from tests.oracles import random_problem

RULE = AttentionRule(
    num_sink_tokens=2, min_tokens=2, sliding_window=9, block_size=8, query_block_size=16, top_p=0.7
)
HEAD_SETS = [(), (0,), (1, 2), (0, 3), (0, 1, 2), (0, 1, 2, 3)]


def run(problem, rule, retrieval_heads, num_decode_queries=0, **options):
    heads, key_value_heads = problem.queries.shape[1], problem.keys.shape[1]
    layout = HeadLayout.build(retrieval_heads, heads, key_value_heads)
    selecting = rule.num_selecting_queries(problem.queries.shape[2], num_decode_queries)
    return headwise_attention(
        *problem.layered(layout, selecting), rule, scaling=problem.scaling, **options
    )


@pytest.mark.parametrize("retrieval_heads", HEAD_SETS, ids=str)
@pytest.mark.parametrize("mode", ["dense", "top_p", "row_share", "row_peak"])
@pytest.mark.parametrize(("q_len", "k_len"), [(1, 63), (30, 63), (63, 63)])
def test_equals_the_oracle(retrieval_heads, mode, q_len, k_len):
    problem = random_problem(q_len, k_len, padding=(0, 17))
    rule = replace(RULE, prefill_mode=mode)
    mask = oracles.headwise_keys(problem, rule, retrieval_heads)
    expected = oracles.attend(problem, mask)
    torch.testing.assert_close(
        run(problem, rule, retrieval_heads, return_log_sum_exp=True), expected
    )
    output, log_sum_exp = run(problem, rule, retrieval_heads)
    torch.testing.assert_close(output, expected[0])
    assert log_sum_exp is None


@pytest.mark.parametrize("num_decode_queries", [1, 7, 30])
@pytest.mark.parametrize("padding", [(0,), (0, 17)])
def test_last_queries_select_as_in_decode_steps(num_decode_queries, padding):
    problem = random_problem(30, 63, padding=padding)
    mask = oracles.headwise_keys(problem, RULE, (0, 3), num_decode_queries)
    assert (mask != oracles.headwise_keys(problem, RULE, (0, 3))).any()
    expected = oracles.attend(problem, mask)
    actual = run(problem, RULE, (0, 3), num_decode_queries, return_log_sum_exp=True)
    torch.testing.assert_close(actual, expected)


@given(
    groups=st.integers(1, 3),
    group=st.integers(1, 3),
    padding=st.lists(st.integers(0, 20), min_size=1, max_size=2),
    lengths=st.tuples(st.integers(1, 25), st.integers(0, 15)),
    shared_index=st.booleans(),
    data=st.data(),
)
@settings(max_examples=40)
def test_equals_the_oracle_for_arbitrary_heads(groups, group, padding, lengths, shared_index, data):
    heads = groups * group
    chosen = sorted(data.draw(st.sets(st.integers(0, heads - 1))))
    shape = {"heads": heads, "key_value_heads": groups, "shared_index": shared_index}
    problem = random_problem(lengths[0], sum(lengths), padding=padding, **shape)
    rule = replace(RULE, prefill_mode="top_p", sliding_window=4, block_size=4)
    mask = oracles.headwise_keys(problem, rule, chosen)
    torch.testing.assert_close(run(problem, rule, chosen)[0], oracles.attend(problem, mask)[0])


@given(groups=st.integers(1, 4), group=st.integers(1, 4), data=st.data())
@settings(max_examples=40)
def test_layout_divides_the_heads_and_restores_their_order(groups, group, data):
    heads = groups * group
    chosen = data.draw(st.permutations(range(heads))).copy()[: data.draw(st.integers(0, heads))]
    layout = HeadLayout.build(chosen, heads, groups)
    parts = [layout.retrieval, layout.local_full, layout.local_windowed]
    joined = torch.cat([part.heads for part in parts])
    assert joined[layout.order].tolist() == list(range(heads))
    assert layout.retrieval.heads.tolist() == chosen
    full, windowed = layout.full_key_value_heads, layout.windowed_key_value_heads
    assert sorted([*full.tolist(), *windowed.tolist()]) == list(range(groups))
    for part, kept in zip(parts, (full, full, windowed), strict=True):
        assert len(part) == part.heads.numel()
        assert torch.equal(kept[part.key_value_heads], part.heads // group)
    for place, ranks in enumerate(layout.retrieval_groups.tolist()):
        members = (layout.retrieval.key_value_heads == place).nonzero()[:, 0].tolist()
        assert ranks == members + [-1] * (len(ranks) - len(members))
    assert layout.retrieval_groups.shape[0] == len(full)


@pytest.mark.parametrize("mode", ["dense", "top_p", "row_share", "row_peak"])
@pytest.mark.parametrize("with_log_sum_exp", [False, True])
def test_gradients_are_those_of_attention_over_a_fixed_mask(mode, with_log_sum_exp):
    problem, rule = random_problem(20, 40, padding=(0, 25)), replace(RULE, prefill_mode=mode)
    mask = oracles.headwise_keys(problem, rule, (0, 3))
    leaves = [problem.queries, problem.keys, problem.values]
    selecting = [problem.index_queries, problem.index_keys]
    for leaf in [*leaves, *selecting]:
        leaf.requires_grad_()
    weights = torch.randn(problem.queries.shape, generator=torch.Generator().manual_seed(0))

    def gradients(output):
        return torch.autograd.grad((output * weights).sum(), leaves)

    output, _ = run(problem, rule, (0, 3), return_log_sum_exp=with_log_sum_exp)
    actual = gradients(output)
    assert all(gradient.isfinite().all() for gradient in actual)
    torch.testing.assert_close(actual, gradients(oracles.attend(problem, mask)[0]))
    if mode != "dense":
        run(problem, rule, (0, 3))[0].sum().backward()
        assert all(leaf.grad is None for leaf in selecting)

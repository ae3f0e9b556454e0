"""Block means in a decode step equal the fp64 oracle, up to the quantised masses of unselected keys."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.ops import SelectionStatistics
from rtpurbo.ops.triton.decode import unselected
from rtpurbo.ops.triton.decode.histogram import LEVEL_WIDTH
from rtpurbo.ops.value_means import mean_values
from tests import oracles
from tests.ops.triton.decode_support import Step, paged
from tests.ops.triton.support import DEVICE, DTYPES, EPSILON

pytestmark = pytest.mark.kernels

RULE = AttentionRule(
    num_sink_tokens=3,
    sliding_window=24,
    block_size=8,
    min_tokens=0,
    top_p=0.6,
    unselected="block_means",
)
HALF_LEVEL = LEVEL_WIDTH.value / 2
GRANULARITIES = ["token", "block"]


@pytest.fixture(autouse=True)
def few_splits(monkeypatch):
    """The interpreter runs programs one after the other."""
    monkeypatch.setattr(unselected, "UNSELECTED_SPLITS", 2)


def with_means(step):
    """The step with the means of all whole blocks in its states, and NaN for the other blocks."""
    full, block_size = step.arguments[1], step.rule.block_size
    k_len = step.problem.keys.shape[2]
    blocks = torch.arange(full.keys.shape[2] // block_size + 2, device=DEVICE)
    means = mean_values(
        full.values, blocks.expand(len(step.padding), -1), block_size, full.first_slots
    )
    for sequence, padding in enumerate(step.padding):
        means[sequence, :, (k_len - padding) // block_size :] = torch.nan
    queries, _, *others = step.arguments
    return step.replaced(arguments=[queries, replace(full, value_means=means), *others])


def with_coarse_index(step):
    """The step with index scores that are multiples of the level width, so that levels are exact."""
    problem = step.problem
    coarse = replace(
        problem,
        index_queries=(problem.index_queries * 2).round() / 2,
        index_keys=problem.index_keys.round(),
    )
    queries, full, windowed, layout, index_queries = step.arguments
    full = replace(full, index_keys=full.index_keys.round())
    arguments = [queries, full, windowed, layout, (index_queries * 2).round() / 2]
    return step.replaced(problem=coarse, arguments=arguments)


def expected_parts(step, selection):
    """Attention of retrieval heads over near and selected keys, and over the others as block means."""
    mask, heads = step.seen(selection), step.layout.retrieval.heads
    read, read_sum = (part[:, heads] for part in oracles.attend(step.problem, mask))
    joined, log_sum = (
        part[:, heads] for part in oracles.attend_with_block_means(step.problem, mask, step.rule)
    )
    share = -torch.expm1((read_sum - log_sum).nan_to_num(0.0))
    share = share.masked_fill(share < 1e-12, 0.0)
    rest = (joined - read * (1 - share)[..., None]) / share[..., None]
    rest = rest.masked_fill((share == 0)[..., None], 0.0)
    return read, read_sum, rest, log_sum + share.log()


def join(read, read_sum, rest, rest_sum):
    log_sum = torch.logaddexp(read_sum, rest_sum)
    share = (rest_sum - log_sum).exp().nan_to_num(0.0)[..., None]
    return read * (1 - share) + rest * share, log_sum, share


def check(step, *, exact=False):
    """Runs the kernels, compares with the oracle, and returns the share of the unselected keys."""
    output, log_sum_exp, selection = step.run(return_log_sum_exp=True)
    heads, dtype = step.layout.retrieval.heads, step.problem.queries.dtype
    output, log_sum_exp = output.cpu().double()[:, heads], log_sum_exp.cpu().double()[:, heads]
    read, read_sum, rest, rest_sum = expected_parts(step, selection)
    rounding = 8 * EPSILON[dtype] * max(1, step.problem.values.abs().max().item())
    if exact:
        expected, expected_sum, share = join(read, read_sum, rest, rest_sum + HALF_LEVEL)
        torch.testing.assert_close(output, expected, rtol=0, atol=rounding)
        torch.testing.assert_close(log_sum_exp, expected_sum, rtol=1e-5, atol=1e-5)
        return share
    least, most = (
        join(read, read_sum, rest, rest_sum + shift)[1] for shift in (-HALF_LEVEL, HALF_LEVEL)
    )
    assert (log_sum_exp >= least - 1e-4).all()
    assert (log_sum_exp <= most + 1e-4).all()
    expected, _, share = join(read, read_sum, rest, rest_sum)
    # Weights within the unselected part, and its share, deviate by half a level each.
    spread = 2 * (torch.tensor(2 * HALF_LEVEL).exp() - 1) * step.problem.values.abs().max()
    assert ((output - expected).abs() <= share * spread + rounding).all()
    return share


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("retrieval_heads", [(0,), (1, 2), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize(
    ("k_len", "padding"),
    [(1, (0,)), (27, (0,)), (28, (0, 3)), (129, (100, 0)), (201, (9, 0))],
    ids=str,
)
def test_exact_if_scores_are_multiples_of_the_level_width(dtype, retrieval_heads, k_len, padding):
    step = Step.build(k_len, RULE, retrieval_heads, dtype=dtype, padding=padding, spare=7)
    share = check(with_means(with_coarse_index(step)), exact=True)
    if k_len > 200:
        assert share.max() > 0.05


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("reading", ["residual", "far"])
@pytest.mark.parametrize("changes", [{}, {"num_sink_tokens": 0}, {"num_sink_tokens": 19}], ids=str)
def test_readings_and_granularities(reading, granularity, changes):
    rule = replace(RULE, reading=reading, granularity=granularity, **changes)
    step = Step.build(301, rule, dtype=torch.float32, padding=(0, 41), spare=5)
    assert check(with_means(step)).max() > 0.05


@pytest.mark.parametrize("splits", [1, 32])
def test_number_of_splits(splits, monkeypatch):
    monkeypatch.setattr(unselected, "UNSELECTED_SPLITS", splits)
    rule = replace(RULE, block_size=2)
    check(with_means(with_coarse_index(Step.build(160, rule, dtype=torch.float32))), exact=True)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("block_size", [1, 5, 24])
def test_block_sizes(granularity, block_size):
    rule = replace(RULE, granularity=granularity, block_size=block_size)
    step = Step.build(190, rule, dtype=torch.float32, padding=(0, 20), in_ring=True)
    check(with_means(step))


@pytest.mark.parametrize("retrieval_window", [8, 9, 60])
def test_retrieval_heads_may_have_another_window(retrieval_window):
    rule = replace(RULE, retrieval_window=retrieval_window)
    step = Step.build(150, rule, (0, 2), dtype=torch.float16, padding=(0, 20), spare=1)
    check(with_means(step))


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "retrieval_heads"),
    [(4, 2, (0, 2, 3)), (6, 2, (1, 3, 4, 5)), (12, 2, (6, 8, 11))],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_index_keys(heads, key_value_heads, retrieval_heads, dtype):
    shape = {"heads": heads, "key_value_heads": key_value_heads, "shared_index": True}
    options = {"padding": (0, 41, 100), "spare": 5, "head_dim": 24, **shape}
    check(with_means(Step.build(157, RULE, retrieval_heads, dtype=dtype, **options)))


@pytest.mark.parametrize("spare", [0, 7])
@pytest.mark.parametrize("padding", [(0, 0), (0, 13)], ids=str)
def test_means_are_computed_if_they_are_not_stored(padding, spare):
    step = Step.build(140, RULE, dtype=torch.float16, padding=padding, spare=spare)
    stored, computed = (each.run(return_log_sum_exp=True) for each in (with_means(step), step))
    assert torch.equal(stored[0], computed[0])
    assert torch.equal(stored[1], computed[1])


def test_unselected_keys_far_below_the_selected_ones():
    step = Step.build(220, replace(RULE, min_tokens=4), (1, 2), dtype=torch.float32)
    queries, full, windowed, layout, index_queries = step.arguments
    step.problem.index_queries *= 30
    step.arguments = [queries, full, windowed, layout, index_queries * 30]
    check(with_means(step))


def test_nothing_is_left_if_p_is_one():
    step = Step.build(120, replace(RULE, top_p=1.0), (0, 3), dtype=torch.float16, spare=3)
    step.check()


def test_learned_sinks_are_part_of_the_log_sum_exp():
    step = with_means(Step.build(150, RULE, (1, 2), dtype=torch.float32))
    sinks = torch.tensor([1.0, -40.0, -40.0, 0.5], device=DEVICE)
    assert check(step).max() > 0.05
    expected, others = step.run(), step.run(sinks=sinks)
    torch.testing.assert_close(others[0][:, 1:3], expected[0][:, 1:3])
    sinks[1:3] = 3.0
    with_sinks = step.run(sinks=sinks, return_log_sum_exp=True)
    assert (with_sinks[1][:, 1:3] > 3.0).all()


def test_statistics_count_what_is_read():
    step = Step.build(200, RULE, dtype=torch.float16)
    counts = []
    for rule in (RULE, replace(RULE, unselected="dropped")):
        statistics = SelectionStatistics()
        step.replaced(rule=rule).run(statistics=statistics)
        counts.append((statistics.far_keys, statistics.far_keys_read, statistics.queries))
    assert counts[0] == counts[1]


def test_pages_are_refused():
    step = Step.build(64, RULE, (0, 3), dtype=torch.float16)
    queries, full, *others = step.arguments
    step.arguments = [queries, paged(full, (0,), 16), *others]
    with pytest.raises(ValueError, match="needs a contiguous cache"):
        step.run()

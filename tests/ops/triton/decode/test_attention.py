"""A decode step equals fp64 attention over what it selected, wherever the keys lie."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.ops import SelectionStatistics
from rtpurbo.ops.triton.decode import window_and_scores, workspace
from rtpurbo.ops.triton.decode.attention import decode_step
from rtpurbo.ops.triton.decode.workspace import zero_histograms
from tests import oracles
from tests.ops.triton.decode_support import Step, paged
from tests.ops.triton.support import DEVICE, DTYPES

pytestmark = pytest.mark.kernels

RULE = AttentionRule(
    num_sink_tokens=3, sliding_window=24, block_size=8, min_tokens=8, top_p=0.6, far_floor=0.01
)
HEAD_SETS = [(), (0,), (1, 2), (3, 0), (0, 1, 2, 3)]
READINGS = ["residual", "far", "paper"]
GRANULARITIES = ["token", "block"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("retrieval_heads", HEAD_SETS, ids=str)
@pytest.mark.parametrize(("k_len", "padding"), [(1, (0,)), (63, (0, 17)), (129, (100, 0))], ids=str)
def test_every_set_of_heads(dtype, retrieval_heads, k_len, padding):
    step = Step.build(k_len, RULE, retrieval_heads, dtype=dtype, padding=padding, spare=7)
    step.check()


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_readings_and_granularities(reading, granularity):
    rule = replace(RULE, reading=reading, granularity=granularity, min_tokens=0)
    step = Step.build(300, rule, dtype=torch.float16, padding=(0, 41))
    mask = step.check()
    near = oracles.near_keys(step.problem, rule.near_window, rule.num_sink_tokens)
    assert 0 < (mask & ~near).sum() < step.far()[:, [1, 2]].sum()


@pytest.mark.parametrize(
    ("heads", "key_value_heads", "head_dim"),
    [(3, 3, 64), (6, 2, 96), (7, 1, 128), (8, 1, 64), (40, 2, 72), (2, 1, 256)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_groups_and_head_dims(heads, key_value_heads, head_dim, dtype):
    chosen = [1] if heads > 2 else [0]
    shape = {"heads": heads, "key_value_heads": key_value_heads, "head_dim": head_dim}
    step = Step.build(140, RULE, chosen, dtype=dtype, in_ring=True, index_dim=12, **shape)
    step.check()


SHARED = [
    (3, 3, (0, 2)),
    (4, 2, (0, 2, 3)),
    (6, 2, (1, 3, 4, 5)),
    (12, 2, range(12)),
    (12, 2, (6, 8, 11)),
    (12, 2, (7, 3, 11, 1, 0, 2, 8, 4)),
    (16, 2, (1, *range(9, 16))),
    (8, 1, range(8)),
    (20, 1, (*range(17), 19)),
]
"""Query heads, KV heads and retrieval heads; of a KV head, 1, 2, 3, 5, 6, 7, 8 or 18 retrieve."""


@pytest.mark.parametrize(("heads", "key_value_heads", "retrieval_heads"), SHARED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shared_index_keys(heads, key_value_heads, retrieval_heads, dtype):
    shape = {"heads": heads, "key_value_heads": key_value_heads, "shared_index": True}
    options = {"padding": (0, 41, 100), "spare": 5, **shape}
    step = Step.build(157, RULE, retrieval_heads, dtype=dtype, **options)
    assert step.arguments[1].index_keys.shape[1] == len(step.layout.full_key_value_heads)
    step.check()


@pytest.mark.parametrize("heads", [(0, 1, 4, 5, 2, 9), (3, 8, 9)], ids=str)
@pytest.mark.parametrize("block_size", [None, 5, 8, 64])
@pytest.mark.parametrize("reading", READINGS)
def test_heads_of_a_group_attend_to_their_own_selections(heads, block_size, reading):
    rule = replace(RULE, reading=reading, top_p=0.4, min_tokens=20, sliding_window=64)
    if block_size:
        rule = replace(rule, granularity="block", block_size=block_size)
    shape = {"heads": 12, "key_value_heads": 2, "padding": (0, 170)}
    step = Step.build(700, rule, heads, dtype=torch.float16, **shape)
    step.check()
    first, second = step.selected(step.run()[2])[0, :2, 0]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("reading", READINGS)
def test_shared_index_keys_in_pages(page_size, granularity, reading):
    rule, padding = replace(RULE, granularity=granularity, reading=reading), (0, 47, 192)
    options = {"heads": 6, "key_value_heads": 2, "shared_index": True, "padding": padding}
    step = Step.build(192, rule, (0, 3, 4), dtype=torch.float16, **options)
    expected = step.run()[0]
    queries, full, *others = step.arguments
    pages = paged(full, padding, page_size)
    assert torch.equal(step.replaced(arguments=[queries, pages, *others]).run()[0], expected)


def test_index_keys_of_another_number_of_heads_are_refused():
    step = Step.build(90, RULE, (0, 1, 2), dtype=torch.float16, key_value_heads=2)
    full = step.arguments[1]
    step.arguments[1] = replace(full, index_keys=full.index_keys[:, :1])
    with pytest.raises(ValueError, match="index keys have 1 heads: expected 3"):
        step.run()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_retrieval_heads_may_have_another_window(granularity):
    for window in (1, 9, 60):
        rule = replace(RULE, retrieval_window=window, granularity=granularity)
        Step.build(150, rule, (0, 2), dtype=torch.float16, padding=(0, 20), in_ring=True).check()


@pytest.mark.parametrize("block_size", [1, 5, 16])
def test_block_sizes_that_are_no_power_of_two(block_size):
    rule = replace(RULE, granularity="block", block_size=block_size, reading="paper")
    Step.build(150, rule, dtype=torch.float16, padding=(0, 20)).check()


@pytest.mark.parametrize("retrieval_heads", [(), (2,), (0, 1)], ids=str)
@pytest.mark.parametrize("k_len", [2, 20, 130])
def test_a_ring_is_read_by_its_labels(retrieval_heads, k_len):
    options = {"dtype": torch.float16, "padding": (0, 1)}
    step = Step.build(k_len, RULE, retrieval_heads, in_ring=True, **options)
    step.check()


def test_every_far_key_is_read_when_p_is_one():
    rule = replace(RULE, top_p=1.0)
    step = Step.build(333, rule, (0, 1, 2, 3), dtype=torch.float16, padding=(0, 50), spare=3)
    assert torch.equal(step.check(), oracles.visible_keys(step.problem))


def test_no_sinks_and_no_floor():
    rule = replace(RULE, num_sink_tokens=0, min_tokens=0)
    Step.build(100, rule, dtype=torch.float16, in_ring=True).check()


def test_sequences_of_only_padding_give_zero():
    step = Step.build(40, RULE, (0,), dtype=torch.float16, padding=(40, 3), spare=5)
    step.check()
    output, log_sum_exp, _ = step.run(return_log_sum_exp=True)
    assert (output[0] == 0).all()
    assert (log_sum_exp[0] == -torch.inf).all()


@pytest.mark.parametrize("retrieval_heads", [(), (0, 2)], ids=str)
def test_states_may_be_views_of_any_stride(retrieval_heads):
    step = Step.build(90, RULE, retrieval_heads, dtype=torch.float16)
    expected, _, _ = step.run()

    def restrided(tensor):
        return tensor.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)

    full, windowed = (
        replace(
            states,
            keys=restrided(states.keys),
            values=restrided(states.values),
            index_keys=None if states.index_keys is None else restrided(states.index_keys),
        )
        for states in step.arguments[1:3]
    )
    queries = step.arguments[0].transpose(2, 3).contiguous().transpose(2, 3)
    arguments = [queries, full, windowed, *step.arguments[3:]]
    assert torch.equal(step.replaced(arguments=arguments).run()[0], expected)


def test_one_shape_serves_every_length():
    step = Step.build(150, RULE, (1, 2), dtype=torch.float16, padding=(0, 9))
    full = step.arguments[1]
    for length in (10, 30, 91, 150):
        shorter = Step.build(length, RULE, (1, 2), dtype=torch.float16, padding=(0, 9))
        used = replace(full, length=torch.tensor([length], dtype=torch.int32, device=DEVICE))
        for name in ("keys", "values", "index_keys"):
            buffer = torch.full_like(getattr(full, name), torch.nan)
            buffer[:, :, :length] = getattr(shorter.arguments[1], name)
            used = replace(used, **{name: buffer})
        shorter.arguments[1] = used
        shorter.check()


@pytest.mark.parametrize("spare", [0, 9])
def test_the_position_of_the_query_may_come_from_labels_where_nothing_retrieves(spare):
    options = {"dtype": torch.float16, "padding": (4, 0, 60)}
    step = Step.build(60, RULE, (), in_ring=True, spare=spare, **options)
    full = step.arguments[1]
    step.arguments[1] = replace(
        full,
        positions=torch.nn.functional.pad(full.positions, (0, spare), value=-1),
        first_slots=None,
        in_order=False,
    )
    step.check()


@pytest.mark.parametrize("shared_keys", [False, True])
@pytest.mark.parametrize("granularity", ["token", "block"])
def test_keys_may_be_scored_by_fewer_programs(monkeypatch, granularity, shared_keys):
    """Three chunks of keys in use, of five that fit in the cache, by two programs for each sequence and head."""
    rule = replace(RULE, granularity=granularity)
    monkeypatch.setattr(workspace, "CHUNK_TOKENS", 128)
    options = {"padding": (0, 41), "spare": 250, "shared_index": shared_keys}
    step = Step.build(350, rule, (0, 1, 3), dtype=torch.float16, **options)
    monkeypatch.setattr(window_and_scores, "MAX_SCORE_PROGRAMS", 12)
    step.check()


@pytest.mark.parametrize("programs", [1, 12, 1000])
@pytest.mark.parametrize("retrieval_heads", [(), (1, 2)], ids=str)
def test_windows_may_be_read_by_fewer_programs(monkeypatch, programs, retrieval_heads):
    monkeypatch.setattr(window_and_scores, "SPLIT", 64)
    monkeypatch.setattr(window_and_scores, "MAX_SPLIT", 256)
    monkeypatch.setattr(window_and_scores, "WINDOW_PROGRAMS", programs)
    rule = replace(RULE, sliding_window=300)
    options = {"padding": (0, 41), "in_ring": True, "key_value_heads": 2}
    Step.build(430, rule, retrieval_heads, dtype=torch.float16, **options).check()


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("changes", [{}, {"granularity": "block"}, {"top_p": 1.0}], ids=str)
def test_pages_hold_the_same(page_size, changes):
    rule = replace(RULE, **changes)
    padding = (0, 47, 192)
    step = Step.build(192, rule, (0, 3), dtype=torch.float16, padding=padding, in_ring=True)
    queries, full, *others = step.arguments
    options = {"scaling": step.problem.scaling, "return_log_sum_exp": True}
    expected = decode_step(queries, full, *others, rule, **options)
    pages = paged(full, padding, page_size)
    actual = decode_step(queries, pages, *others, rule, **options)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("changes", [{}, {"granularity": "block"}, {"top_p": 1.0}], ids=str)
def test_statistics_count_the_keys_read(changes):
    counted = SelectionStatistics()
    step = Step.build(150, replace(RULE, **changes), dtype=torch.float16, padding=(0, 120), spare=4)
    _, _, selection = step.run(statistics=counted)
    far = step.far()[:, :1]
    expected = SelectionStatistics()
    expected.add(far, step.selected(selection))
    assert counted == expected
    assert counted.queries == 4


def test_arguments_that_do_not_fit_are_rejected():
    step = Step.build(60, RULE, dtype=torch.float16)
    queries, full, windowed, layout, index_queries = step.arguments

    def refuses(reason, rule=RULE, **changes):
        given = {"query_states": queries, "full": full, "index_queries": index_queries, **changes}
        with pytest.raises(ValueError, match=reason):
            decode_step(windowed=windowed, layout=layout, rule=rule, scaling=1.0, **given)

    refuses("one query token", query_states=queries.expand(-1, -1, 2, -1))
    refuses("at most 256", query_states=queries.repeat(1, 1, 1, 17))
    refuses("contiguous elements", full=replace(full, keys=full.keys.mT.contiguous().mT))
    refuses("need index queries", index_queries=None)
    refuses("order of the keys is unknown", full=replace(full, in_order=False))
    blocks = replace(RULE, granularity="block", block_size=2048, sliding_window=4096)
    refuses("block_size is 2048", rule=blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_long_sequences_on_a_gpu(dtype, reading, granularity):
    rule = AttentionRule(
        sliding_window=1024, block_size=64, reading=reading, granularity=granularity
    )
    shape = {"heads": 16, "key_value_heads": 4, "head_dim": 128, "index_dim": 16}
    options = {"padding": (0, 777), "spare": 1000, "in_ring": True}
    Step.build(20001, rule, (0, 1, 5), dtype=dtype, **options, **shape).check()


@pytest.mark.parametrize("reading", ["residual", "paper"])
@pytest.mark.parametrize("heads", [(0, 1, 2, 3), (2,), ()], ids=str)
def test_the_histogram_workspace_is_zero_after_a_step(reading, heads):
    step = Step.build(300, replace(RULE, reading=reading), heads, dtype=DTYPES[0], padding=(0, 40))
    queries, full, windowed, layout, index_queries = step.arguments
    histogram_workspace = zero_histograms(2 * len(heads), queries.device)
    for states in (
        full,
        replace(full, histogram_workspace=histogram_workspace),
        replace(full, histogram_workspace=histogram_workspace),
    ):
        output, *_ = decode_step(
            queries,
            states,
            windowed,
            layout,
            index_queries,
            step.rule,
            scaling=step.problem.scaling,
        )
        if states is full:
            alone = output
        assert torch.equal(output, alone)
        assert not histogram_workspace.any()


@pytest.mark.gpu
def test_a_step_can_be_captured_and_replayed_as_sequences_grow():
    step = Step.build(4000, RULE, (0, 1, 2, 3), dtype=torch.float16)
    queries, full, windowed, layout, index_queries = step.arguments
    length = torch.tensor([4000], dtype=torch.int32, device=DEVICE)
    options = {"scaling": step.problem.scaling, "return_log_sum_exp": True}
    grown = replace(full, length=length, histogram_workspace=zero_histograms(4, queries.device))
    arguments = (queries, grown, windowed, layout, index_queries, RULE)
    decode_step(*arguments, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode_step(*arguments, **options)
    for tokens in (100, 2000, 4000):
        length.fill_(tokens)
        graph.replay()
        assert torch.equal(captured[0], decode_step(*arguments, **options)[0])

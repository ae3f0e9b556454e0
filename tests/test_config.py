"""Configuration: a round trip through JSON, ranges, and what a head map knows."""

import json
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rtpurbo.config import (
    AttentionRule,
    HeadMap,
    IndexerSettings,
    RTPurboConfig,
    default_sliding_window,
)
from rtpurbo.errors import RTPurboError

HEAD_MAP = HeadMap(((0, 5), None, (), (2, 3)), 6, 3, ((0.5,) * 6, None, (0.0,) * 6, (1.0,) * 6))


@st.composite
def head_maps(draw):
    """Maps whose layers have the same numbers of heads, or numbers of their own."""
    shapes = st.tuples(st.integers(1, 4), st.integers(1, 4))
    own = st.just(draw(shapes)) if draw(st.booleans()) else shapes
    layers = draw(st.lists(st.none() | own, min_size=1, max_size=6))
    heads = [
        None if shape is None else tuple(sorted(draw(st.sets(st.integers(0, prod(shape) - 1)))))
        for shape in layers
    ]
    query_heads = tuple(None if shape is None else prod(shape) for shape in layers)
    kv_heads = tuple(None if shape is None else shape[0] for shape in layers)
    return HeadMap(tuple(heads), query_heads, kv_heads)


@pytest.mark.parametrize(
    "config",
    [
        RTPurboConfig(HEAD_MAP),
        RTPurboConfig(
            HeadMap(((1,),), 2, 2, granularity="kv_group"),
            AttentionRule(2, 32, 0.5, "far", 0.2, 7, "block", 16, "row_share", 8, row_share=0.25),
            IndexerSettings(8, "pre_rope", 512.0),
        ),
    ],
)
def test_a_configuration_survives_json(config):
    assert RTPurboConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(head_map=head_maps())
@settings(max_examples=40)
def test_any_head_map_survives_json(head_map):
    config = RTPurboConfig(head_map)
    assert RTPurboConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_head_map_of_equal_layers_is_stored_as_before():
    assert json.dumps(RTPurboConfig(HEAD_MAP).to_dict()["head_map"]) == (
        '{"retrieval_heads": [[0, 5], null, [], [2, 3]], "num_attention_heads": 6, '
        '"num_key_value_heads": 3, "scores": [[0.5, 0.5, 0.5, 0.5, 0.5, 0.5], null, '
        "[0.0, 0.0, 0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]], "
        '"granularity": "query_head"}'
    )


@pytest.mark.parametrize("part", ["head_map", "attention", "indexer"])
@pytest.mark.parametrize("spoil", ["missing", "unknown field"])
def test_an_incomplete_or_unknown_dictionary_is_refused(part, spoil):
    data = RTPurboConfig(HEAD_MAP).to_dict()
    if spoil == "missing":
        del data[part]
    else:
        data[part]["surprise"] = 1
    with pytest.raises(RTPurboError, match=part if spoil == "missing" else "surprise"):
        RTPurboConfig.from_dict(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_p": 0}, "top_p is 0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"row_share": 0}, "row_share is 0"),
        ({"row_share": 1.5}, "row_share is 1.5"),
        ({"far_floor": -0.1}, "far_floor is -0.1"),
        ({"far_floor": 1}, "far_floor is 1"),
        ({"block_size": 0}, "at least 1"),
        ({"query_block_size": 0}, "at least 1"),
        ({"num_sink_tokens": -1}, "num_sink_tokens is -1"),
        ({"sliding_window": 63}, "smaller than block_size"),
        ({"reading": "aloud"}, "reading is 'aloud'.*paper, residual, far"),
        ({"granularity": "page"}, "granularity is 'page'"),
        ({"prefill_mode": "magic"}, "prefill_mode is 'magic'"),
    ],
    ids=str,
)
def test_an_attention_rule_out_of_range_is_refused(changes, message):
    with pytest.raises(RTPurboError, match=message):
        AttentionRule(**changes)
    with pytest.raises(RTPurboError, match=message):
        RTPurboConfig(HEAD_MAP).with_rule(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"index_dim": 0}, "index_dim is 0"), ({"index_space": "outer"}, "index_space is 'outer'")],
)
def test_indexer_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(RTPurboError, match=message):
        IndexerSettings(**changes)


def test_values_at_the_ends_of_their_ranges_are_accepted():
    AttentionRule(top_p=1, row_share=1, far_floor=0, num_sink_tokens=0, sliding_window=64)
    AttentionRule(block_size=1, sliding_window=1, query_block_size=1)


@pytest.mark.parametrize("heads", [(6,), (-1,), (0, 9)])
def test_a_head_map_names_only_heads_that_exist(heads):
    with pytest.raises(RTPurboError, match=r"layer 1.*6 query heads"):
        HeadMap(((0,), heads), 6, 3)


def test_with_rule_changes_nothing_else():
    config = RTPurboConfig(HEAD_MAP)
    changed = config.with_rule(top_p=0.5)
    assert changed.attention == AttentionRule(top_p=0.5)
    assert (changed.head_map, changed.indexer) == (config.head_map, config.indexer)
    assert config.attention == AttentionRule()


def test_a_head_map_counts_its_heads():
    assert HEAD_MAP.num_retrieval_heads == 4
    assert HEAD_MAP.num_heads == 18
    assert [HEAD_MAP.full_key_value_heads(layer) for layer in range(4)] == [[0, 2], [], [], [1]]
    assert HEAD_MAP.num_full_key_value_heads == 3


@given(head_map=head_maps())
@settings(max_examples=40)
def test_full_key_value_heads_are_those_that_serve_a_retrieval_head(head_map):
    for layer in head_map.converted_layers:
        group, heads = head_map.group_size(layer), head_map.retrieval_heads[layer]
        full = head_map.full_key_value_heads(layer)
        for head in range(head_map.num_kv_heads(layer)):
            query_heads = set(range(head * group, (head + 1) * group))
            assert (head in full) == bool(query_heads & set(heads))


def test_equal_numbers_of_heads_are_one_number():
    head_map = HeadMap(((0,), None, ()), (6, None, 6), (3, None, 2))
    assert head_map.num_attention_heads == 6
    assert head_map.num_key_value_heads == (3, None, 2)
    assert not head_map.is_uniform
    assert HeadMap(((0,), None, ()), (6, None, 6), 3) == HeadMap(((0,), None, ()), 6, 3)
    assert head_map.num_heads == 12
    assert [head_map.num_kv_heads(layer) for layer in range(3)] == [3, 0, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": [6, 6, 6, 6]}, "each of the 3 converted layers"),
        ({"num_key_value_heads": [3, None, 3]}, "each of the 3 converted layers"),
        ({"num_key_value_heads": [3, None, "3", 3]}, "num_key_value_heads is .*whole number"),
        ({"num_key_value_heads": [3, None, True, 3]}, "num_key_value_heads is .*whole number"),
        ({"num_key_value_heads": None}, "num_key_value_heads is None"),
        ({"num_attention_heads": "6"}, "num_attention_heads is '6'"),
        ({"num_key_value_heads": [3, None, 4, 3]}, "6 query heads and 4 KV heads in layer 2"),
        ({"num_attention_heads": [6, None, 9, 6]}, "scores must hold a number for each query head"),
        ({"num_attention_heads": [6, None, 6, 3]}, "heads .2, 3. in layer 3.*3 query heads"),
    ],
    ids=str,
)
def test_numbers_of_heads_that_do_not_fit_are_refused(changes, message):
    data = RTPurboConfig(HEAD_MAP).to_dict()
    data["head_map"] |= changes
    with pytest.raises(RTPurboError, match=message):
        RTPurboConfig.from_dict(data)


def test_a_uniform_head_map_skips_layers_that_are_not_converted():
    head_map = HeadMap.uniform([3, 1], [True, False, True], 4, 2)
    assert head_map.retrieval_heads == ((1, 3), None, (1, 3))


@pytest.mark.parametrize(
    ("context", "window"),
    [(1, 256), (2048, 256), (4096, 512), (8192, 1024), (32768, 4096), (65536, 8192), (10**6, 8192)],
)
def test_the_default_window_is_an_eighth_of_the_context_within_bounds(context, window):
    assert default_sliding_window(context) == window


@given(contexts=st.tuples(st.integers(1, 10**7), st.integers(1, 10**7)))
@settings(max_examples=60)
def test_the_default_window_grows_with_the_context(contexts):
    small, large = map(default_sliding_window, sorted(contexts))
    assert 256 <= small <= large <= 8192

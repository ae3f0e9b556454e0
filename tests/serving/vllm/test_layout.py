import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo.config import AttentionRule, HeadMap, IndexerSettings, RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.serving.vllm.layout import MAX_WINDOWED_GROUPS, dense_capacity, plan_cache
from rtpurbo.serving.vllm.rank_heads import TokenBytes, heads_of_rank

HEAD_DIM, BYTES = 64, 2
ARTIFACT = Path(__file__).parents[3] / "artifacts" / "smollm2-135m-instruct"


def config_of(layers, heads=8, key_value_heads=4, window=256, sinks=4, **rule):
    head_map = HeadMap(tuple(map(tuple, layers)), heads, key_value_heads)
    return RTPurboConfig(
        head_map, AttentionRule(sliding_window=window, num_sink_tokens=sinks, **rule)
    )


head_maps = st.lists(
    st.lists(st.integers(0, 7), unique=True, max_size=8).map(sorted), min_size=1, max_size=12
)
lengths = st.integers(1, 40_000)


def plan_of(config, tokens=8192, in_flight=512, **options):
    return plan_cache(
        config,
        TokenBytes.of(config, HEAD_DIM, BYTES),
        tokens=tokens,
        in_flight=in_flight,
        **options,
    )


@given(head_maps, st.integers(64, 9000), st.sampled_from([1, 2, 4]))
def test_every_head_of_every_rank_has_room(layers, window, world_size):
    config = config_of(layers, window=window)
    token_bytes = TokenBytes.of(config, HEAD_DIM, BYTES)
    plan = plan_of(config, world_size=world_size)
    assert len(plan.windowed) <= MAX_WINDOWED_GROUPS
    placed = [layer for group in plan.windowed for layer in group.layers]
    assert len(placed) == len(set(placed))
    for rank in range(world_size):
        heads = heads_of_rank(config.head_map, rank, world_size)
        for layer, of_layer in enumerate(heads):
            if of_layer.num_full:
                assert layer in plan.full.layers
            if of_layer.num_windowed:
                assert layer in placed
        if plan.full:
            needed = sum(token_bytes.full(heads[layer]) for layer in plan.full.layers)
            assert plan.full.token_bytes >= needed
        for group in plan.windowed:
            needed = sum(token_bytes.windowed(heads[layer]) for layer in group.layers)
            assert group.token_bytes >= needed
    assert all(group.page_bytes <= plan.block_bytes for group in plan.groups)
    # Parts of a block are aligned to 16 bytes, as kernels load them.
    assert plan.block_bytes % 16 == 0


@given(head_maps, lengths, st.integers(16, 8192))
def test_never_worse_than_one_group_of_small_blocks(layers, tokens, in_flight):
    config = config_of(layers)
    token_bytes = TokenBytes.of(config, HEAD_DIM, BYTES)
    heads = heads_of_rank(config.head_map)
    full = sum(map(token_bytes.full, heads))
    windowed = sum(map(token_bytes.windowed, heads))
    pages = -(-tokens // 16)
    held = min(pages, -(-min(255 + in_flight, tokens) // 16) + 2)
    naive = max(full, windowed) * 16 * (pages * (full > 0) + held * (windowed > 0))
    plan = plan_of(config, tokens, in_flight)
    assert plan.request_bytes(tokens, in_flight) <= naive


@given(head_maps, lengths)
def test_a_request_has_room_for_sinks_and_window(layers, tokens):
    config = config_of(layers)
    token_bytes = TokenBytes.of(config, HEAD_DIM, BYTES)
    plan = plan_of(config)
    heads = heads_of_rank(config.head_map)
    rule = config.attention
    near = min(tokens, rule.sliding_window + rule.num_sink_tokens)
    needed = sum(
        token_bytes.full(layer) * tokens + token_bytes.windowed(layer) * near for layer in heads
    )
    assert plan.request_bytes(tokens, 512) >= needed


def test_blocks_of_a_request_by_hand():
    # 6 layers, one of them with two full KV heads: blocks of 16 and one windowed group.
    config = config_of([[0, 2], [], [], [], [], []], window=64)
    plan = plan_of(config, tokens=512, in_flight=64)
    full, windowed = plan.full, plan.windowed
    assert full.token_bytes == 2 * 2 * HEAD_DIM * BYTES + 2 * 16 * BYTES
    assert sum(group.token_bytes for group in windowed) == 22 * 2 * HEAD_DIM * BYTES
    expected = -(-512 // full.block_size)
    for group in windowed:
        expected += -(-(63 + 64) // group.block_size) + 1 + 1
    assert plan.blocks_per_request(512, 64) == expected
    assert plan.capacity(100 * plan.block_bytes, 512, 64) == int(100 / expected * 512)


def test_layers_with_a_window_of_their_own_by_hand():
    converted = (0, 3)
    config = config_of([[0, 2], [], [], []], window=256, dense_prompt_queries=8)
    head_map = replace(config.head_map, retrieval_heads=((0, 2), None, None, ()))
    config = replace(config, head_map=head_map)
    plan = plan_of(config, tokens=2048, in_flight=64, own_window=100)
    own = [group for group in plan.windowed if group.window is not None]
    assert [layer for group in own for layer in group.layers] == [1, 2]
    assert all(plan.retention(group) == (100, 0, False) for group in own)
    others = [group for group in plan.windowed if group.window is None]
    assert {layer for group in others for layer in group.layers} == set(converted)
    assert all(plan.retention(group) == (256, 4, True) for group in others)
    expected = sum(2048 // group.block_size for group in (plan.full, *others))
    expected += sum(-(-(99 + 64) // group.block_size) + 1 for group in own)
    assert plan.blocks_per_request(2048, 64) == expected

    # Dense: two layers keep everything, two keep windows.
    token_bytes = TokenBytes.of(config, HEAD_DIM, BYTES)
    options = {"tokens": 2048, "in_flight": 64, "own_window": 100}
    dense = dense_capacity(config, token_bytes, 2**30, **options)
    all_layers = 2**30 // (4 * 4 * token_bytes.key_value)
    assert 1.7 * all_layers < dense < 2 * all_layers
    assert plan.capacity(2**30, 2048, 64) > dense


def test_only_one_request_keeps_its_whole_prompt():
    config = config_of([[0, 2], [], [], [], [], []], window=64, dense_prompt_queries=8)
    plan = plan_of(config, tokens=512, in_flight=64)
    assert plan.keeps_prompts
    windowed = plan_of(config_of([[0, 2], [], [], [], [], []], window=64), tokens=512, in_flight=64)
    assert replace(plan, keeps_prompts=False) == windowed
    largest = sum(-(-512 // group.block_size) for group in plan.groups)
    assert plan.blocks_per_request(512, 64) == largest
    after = windowed.blocks_per_request(512, 64)
    assert plan.blocks_after_prompt(512, 64) == after < largest
    assert plan.request_bytes(512, 64) == windowed.request_bytes(512, 64)
    memory = (largest + 10 * after) * plan.block_bytes
    assert plan.capacity(memory, 512, 64) == 11 * 512
    assert plan.capacity((largest - 1) * plan.block_bytes, 512, 64) < 512


@pytest.mark.parametrize("sinks", [40, 64])
def test_every_request_has_blocks_for_its_heavy_hitters(sinks):
    rule = {"dense_prompt_queries": 8, "num_heavy_hitters": 30}
    config = config_of([[0, 2], [], [], [], [], []], window=80, sinks=sinks, **rule)
    plan = plan_of(config, tokens=512, in_flight=64)
    if sinks == 40:
        # In larger blocks, too many tokens would follow the last sink.
        assert {group.block_size for group in plan.windowed} == {16}
    held = sum(
        -(-sinks // group.block_size) - (sinks - 30) // group.block_size for group in plan.windowed
    )
    assert plan.num_own_blocks == held > 0
    shared = replace(plan, num_heavy_hitters=0)
    assert plan.blocks_per_request(512, 64) == shared.blocks_per_request(512, 64) + held
    assert plan.blocks_after_prompt(512, 64) == shared.blocks_after_prompt(512, 64) + held


def test_without_retrieval_heads_and_with_nothing_else():
    all_local, all_full = plan_of(config_of([[], []])), plan_of(config_of([range(8), range(8)]))
    assert all_local.full is None
    assert len(all_local.windowed) >= 1
    assert all_full.windowed == ()
    assert all_full.full.block_size == 16
    assert plan_of(config_of([range(8)]), lone_block_size=128).full.block_size == 128
    # vLLM sets the block size of a lone group, but blocks for heavy hitters are a group too.
    rule = {"dense_prompt_queries": 8, "num_heavy_hitters": 4}
    all_local = plan_of(config_of([[]], **rule), lone_block_size=24)
    assert [group.block_size for group in all_local.windowed] == [16]
    assert plan_of(config_of([range(8)], **rule), lone_block_size=128).num_own_blocks == 0


@pytest.mark.parametrize("cache_dtype", ["fp8", "fp8_e4m3"])
def test_float8_keys_and_values_take_half_the_room(cache_dtype):
    config = config_of([[0], [], [4]])
    half = TokenBytes.of(config, HEAD_DIM, BYTES)
    quarter = TokenBytes.of(config, HEAD_DIM, BYTES, cache_dtype)
    assert quarter.key_value * 2 == half.key_value
    assert quarter.index == half.index


def test_float8_index_keys_take_half_the_room():
    both = [config_of([[0]], index_storage=kind) for kind in ("model", "float8")]
    half, quarter = (TokenBytes.of(config, HEAD_DIM, BYTES).index for config in both)
    assert half == 2 * quarter


@pytest.mark.parametrize(("shared_keys", "index_keys"), [(False, 4), (True, 2)])
def test_uneven_ranks_share_the_larger_size(shared_keys, index_keys):
    config = config_of([[0, 1, 2, 3], [4]])
    config = replace(config, indexer=IndexerSettings(shared_keys=shared_keys))
    plan = plan_of(config, world_size=2)
    index = 16 * BYTES
    assert plan.full.token_bytes == 2 * 2 * HEAD_DIM * BYTES + index_keys * index


@pytest.mark.parametrize("world_size", [3, 8])
def test_refuses_heads_that_cannot_be_divided(world_size):
    with pytest.raises(RTPurboError, match="cannot be divided among"):
        plan_of(config_of([[0]]), world_size=world_size)


def test_the_cache_has_room_for_more_tokens_than_the_dense_one():
    data = json.loads((ARTIFACT / "rtpurbo_config.json").read_text())
    config = RTPurboConfig.from_dict(data["config"])
    token_bytes = TokenBytes.of(config, 64, 4)
    plan = plan_cache(config, token_bytes, tokens=8192, in_flight=512)
    ratio = plan.capacity(2**30, 8192, 512) / dense_capacity(
        config, token_bytes, 2**30, tokens=8192, in_flight=512
    )
    assert ratio > 2

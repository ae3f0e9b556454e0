import pytest
import torch

from rtpurbo.benchmarks.layer import LayerShape, LayerStates
from rtpurbo.benchmarks.lists import (
    CausalBlocks,
    density_of,
    listed_keys,
    synthetic_lists,
)
from rtpurbo.benchmarks.sparse_prefill import SparsePrefill
from rtpurbo.config import AttentionRule
from tests.benchmarks.support import CPU, RULE, SHAPE

LONG = AttentionRule(sliding_window=8192, retrieval_window=512, prefill_mode="row_peak")


def chunks_of(length, rule, tiles_at_once):
    tiles = -(-length // rule.query_block_size)
    return [
        (tile * rule.query_block_size, min(tiles_at_once, tiles - tile))
        for tile in range(0, tiles, tiles_at_once)
    ]


def entries(lists, head, tile):
    edge, whole = lists.counts[0, head, tile].tolist()
    line = lists.blocks[0, head, tile]
    return line[:edge].tolist(), line[lists.edge_slots : lists.edge_slots + whole].tolist()


@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 1.0])
def test_lists_have_the_requested_density(density):
    length = 32768
    lists = synthetic_lists(chunks_of(length, LONG, 100), length, LONG, 2, density, CPU)
    assert sorted(lists) == [0, 12800, 25600]
    assert density_of(lists, length, LONG) == pytest.approx(density, rel=0.01)


def test_near_blocks_alone_can_exceed_the_density():
    lists = synthetic_lists(chunks_of(2048, LONG, 100), 2048, LONG, 1, 0.02, CPU)
    density = density_of(lists, 2048, LONG)
    assert density == pytest.approx(CausalBlocks.of(2048, LONG).near_share)
    assert density > 0.02
    assert not lists[0].counts.any()


@pytest.mark.parametrize("length", [8192, 8000, 129])
def test_lists_ascend_without_double_near_or_odd_entries(length):
    heads = 3
    lists = synthetic_lists(chunks_of(length, LONG, 10), length, LONG, heads, 0.3, CPU)
    others = 0
    for row, chunk in lists.items():
        assert chunk.counts.shape[:2] == (1, heads)
        for tile in range(chunk.blocks.shape[2]):
            first_row = row + tile * LONG.query_block_size
            lines = [entries(chunk, head, tile) for head in range(heads)]
            others += lines[0] != lines[1]
            for edge, whole in lines:
                assert not edge
                assert len(whole) % 2 == 0
                assert whole == sorted(set(whole))
                # Neither the sinks' block, nor one that a window of the tile touches.
                assert all(
                    block >= 1 and (block + 1) * LONG.block_size <= first_row - LONG.near_window + 1
                    for block in whole
                )
    assert others or length < 1000


def test_entries_are_spread_over_all_that_is_far():
    length = 65536
    lists = synthetic_lists(chunks_of(length, LONG, 1000), length, LONG, 1, 0.1, CPU)
    _, whole = entries(lists[0], 0, lists[0].blocks.shape[2] - 1)
    gaps = torch.tensor(whole).diff()
    assert whole[0] < 25
    assert gaps.max() < 25
    assert gaps.min() < gaps.max()


def test_the_same_seed_makes_the_same_lists():
    made = [synthetic_lists([(0, 64)], 8192, LONG, 2, 0.3, CPU, seed)[0] for seed in (1, 1, 2)]
    assert torch.equal(made[0].blocks, made[1].blocks)
    assert not torch.equal(made[0].blocks, made[2].blocks)


def test_density_and_keys_of_lists_that_an_index_found():
    length = 200
    shape = LayerShape(4, 2, 16, (1, 2), 16)
    states = LayerStates.random(shape, length, length, torch.float16, CPU, seed=1)
    layout = shape.layout(CPU)
    operator = SparsePrefill(layout, RULE)
    full, windowed = states.divided(layout)
    lists = dict(
        operator.found_lists(states.queries, full, windowed, states.index_queries, states.scaling)
    )
    read = causal = 0
    for row, chunk in lists.items():
        for tile in range(chunk.blocks.shape[2]):
            first = row + tile * 32
            last = min(first + 32, length) - 1
            near = {0} | set(range(max(0, first - 15) // 16, last // 16 + 1))
            for head in range(2):
                edge, whole = entries(chunk, head, tile)
                read += len(near | set(edge) | set(whole))
                causal += last // 16 + 1
    assert density_of(lists, length, RULE) == pytest.approx(read / causal)

    [(row, chunk)] = lists.items()
    tile = 5
    edge, whole = entries(chunk, 1, tile)
    keys = listed_keys(lists, 1, torch.tensor([row + tile * 32 + 3]), length)
    assert set((keys[0].nonzero()[:, 0] // 16).tolist()) == set(edge) | set(whole)
    assert int(chunk.valid()[0, 1, tile].sum()) == len(edge) + len(whole)


def test_a_layer_spreads_its_retrieval_heads():
    assert LayerShape.spread(32, 4, 128, 5).retrieval_heads == (3, 9, 16, 22, 28)
    assert LayerShape.spread(4, 2, 128, 4).retrieval_heads == (0, 1, 2, 3)
    assert SHAPE.whole_groups() == (0, 1)

"""Tables of tiles, compared with the visibility of every pair of a query and a key."""

import pytest
import torch

from rtpurbo.ops.packed import document_starts
from rtpurbo.ops.triton.training.ranges import key_block_ranges, query_block_ranges

CASES = [
    ((1,), None),
    ((300,), None),
    ((100, 3, 130, 100), None),
    ((5, 400), None),
    ((200, 200), [0, 1, 80, 199, 200, 203, 260, 390, 399]),
]
REACHES = [(0, 0), (3, 40), (0, 16), (20, 1)]


def pairs(documents, rows, margin, lag):
    """Places, starts, and which keys each row sees and counts: two bool [rows, length]."""
    starts = document_starts(documents, "cpu")
    places = torch.arange(len(starts)) if rows is None else torch.tensor(rows)
    keys, at, begin = torch.arange(len(starts)), places[:, None], starts[places][:, None]
    seen = (keys >= begin) & (keys <= at)
    return places, starts[places], seen, (keys >= begin + margin) & (keys <= at - lag)


@pytest.mark.parametrize(("margin", "lag"), REACHES)
@pytest.mark.parametrize(("documents", "rows"), CASES, ids=str)
def test_ranges_of_query_blocks(documents, rows, margin, lag):
    places, starts, seen, counted = pairs(documents, rows, margin, lag)
    tiles = query_block_ranges(places, starts, margin, lag, 32, 16)
    for number, bounds in enumerate(tiles.tolist()):
        begin, far_from, far_to, near_from, near_to, end = bounds
        assert bounds == sorted(bounds)
        assert all(bound % 16 == 0 for bound in bounds[:-1])
        mine = slice(number * 32, number * 32 + 32)
        assert not seen[mine, :begin].any()
        assert not seen[mine, end:].any()
        assert counted[mine, far_from:far_to].all()
        assert seen[mine, near_from:near_to].all()
        assert not counted[mine, near_from:near_to].any()


@pytest.mark.parametrize(("margin", "lag"), REACHES)
@pytest.mark.parametrize(("documents", "rows"), CASES, ids=str)
def test_ranges_of_key_tiles(documents, rows, margin, lag):
    places, starts, _, counted = pairs(documents, rows, margin, lag)
    tiles = key_block_ranges(places, starts, counted.shape[1], margin, lag, 16, 32)
    for number, (first, whole_from, whole_to, end) in enumerate(tiles.tolist()):
        assert first <= whole_from <= whole_to <= end <= len(places)
        assert (whole_to - whole_from) % 16 == 0
        # What begins before has to end there, or rows would count twice.
        assert whole_to == whole_from or (whole_from - first) % 16 == 0
        mine = counted[:, number * 32 : number * 32 + 32]
        assert not mine[:first].any()
        assert not mine[end:].any()
        assert mine[whole_from:whole_to].all()


def test_most_tiles_of_a_long_document_need_no_mask():
    places = torch.arange(4096)
    starts = torch.zeros_like(places)
    tiles = query_block_ranges(places, starts, 4, 512, 128, 64)[-1].tolist()
    assert tiles[2] - tiles[1] > 0.8 * 4096
    assert tiles[4] - tiles[3] >= 512 - 128 - 64
    first, whole_from, whole_to, end = key_block_ranges(places, starts, 4096, 4, 512, 64, 128)[2]
    assert whole_to - whole_from > 0.9 * (end - first)

"""Tokens appended to pages equal those appended to a static cache, one sequence each."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.ops.triton.decode.fused_append import PagedSlots, RotaryTable, fused_kv_append
from tests.ops.triton.decode.test_fused_append import NEWEST, Entrance, bits
from tests.ops.triton.support import DEVICE, DTYPES

pytestmark = pytest.mark.kernels

PAGES, FULL_PAGE, WINDOWED_PAGE = 3, 8, 4
# Place of each token in the pages; the last one is padding.
FULL_SLOTS = [9, 0, 23, -1]
WINDOWED_SLOTS = [11, 2, 5, -1]
POSITIONS = [3, 0, 7, 0]
TOKENS = len(POSITIONS)


def paged(like, page_size):
    """NaN pages with the heads and dimensions of a static cache, in the middle of larger blocks."""
    _, heads, _, dim = like.shape
    blocks = torch.zeros(PAGES, 5 + heads * page_size * dim, dtype=like.dtype, device=DEVICE)
    blocks.view(torch.uint8).fill_(127)
    return blocks[:, 3:-2].unflatten(1, (heads, page_size, dim))


def append(dtype, rotary_dim=16, table_dtype=None, lengths=None, prompt_lengths=None, **options):
    """The same tokens in a static cache and in pages: results of both calls, and the caches."""
    static = Entrance(dtype, batch=TOKENS, rotary_dim=rotary_dim, **options)
    rotary = None
    if rotary_dim:
        angles = torch.randn(11, rotary_dim // 2, dtype=torch.float64)
        table = torch.cat([angles.cos(), angles.sin()], -1).to(DEVICE, table_dtype or dtype)
        positions = torch.tensor(POSITIONS, device=DEVICE)
        rows = table[positions].to(dtype)[:, None].chunk(2, -1)
        static.rotary = tuple(torch.cat([part, part], -1) for part in rows)
        rotary = RotaryTable(table, positions)
    slots = static.slots
    pages = PagedSlots(
        torch.tensor(FULL_SLOTS, device=DEVICE),
        torch.tensor(WINDOWED_SLOTS, device=DEVICE),
        paged(slots.full_keys, FULL_PAGE),
        paged(slots.full_values, FULL_PAGE),
        paged(slots.windowed_keys, WINDOWED_PAGE),
        paged(slots.windowed_values, WINDOWED_PAGE),
        None if slots.index_keys is None else paged(slots.index_keys, FULL_PAGE),
        *(
            part and torch.tensor(part, dtype=torch.int32, device=DEVICE)
            for part in (lengths, prompt_lengths)
        ),
    )
    states = (static.queries, static.keys, static.values)
    expected = fused_kv_append(
        *states, static.rotary, static.norm, static.projection, static.layout, slots
    )
    actual = fused_kv_append(*states, rotary, static.norm, static.projection, static.layout, pages)
    return static, pages, expected, actual


def assert_in_pages(static, pages):
    """Every stored token is in its place, and nothing else was written."""
    for name, places, size in (
        ("full_keys", FULL_SLOTS, FULL_PAGE),
        ("full_values", FULL_SLOTS, FULL_PAGE),
        ("windowed_keys", WINDOWED_SLOTS, WINDOWED_PAGE),
        ("windowed_values", WINDOWED_SLOTS, WINDOWED_PAGE),
        ("index_keys", FULL_SLOTS, FULL_PAGE),
    ):
        held, cache = getattr(pages, name), getattr(static.slots, name)
        if cache is None:
            continue
        wanted = paged(cache, size)
        for token, place in enumerate(places):
            if place >= 0:
                slot = static.entering[token] if name.startswith("windowed") else NEWEST
                wanted[place // size, :, place % size] = cache[token, :, slot]
        assert torch.equal(bits(held.contiguous()), bits(wanted.contiguous())), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm": "weight", "rotated": False},
        {"norm": "weight", "rotary_dim": 6, "table_dtype": torch.float32},
        {"norm": "unit_offset"},
        {"retrieval_heads": ()},
        {"retrieval_heads": range(6), "index_dtype": torch.float8_e4m3fn},
        {"retrieval_heads": (0, 1, 4), "shared_keys": True},
        {"rotary_dim": 0},
    ],
    ids=str,
)
def test_equals_a_static_cache(dtype, options):
    static, pages, expected, actual = append(dtype, **options)
    assert torch.equal(actual[0], expected[0])
    if expected[1] is not None:
        assert torch.equal(actual[1], expected[1])
    assert_in_pages(static, pages)


def test_index_queries_of_prompts_are_zeros():
    lengths, prompt_lengths = [4, 1, 8, 0], [3, 1, 9, 0]
    _, _, expected, actual = append(DTYPES[0], lengths=lengths, prompt_lengths=prompt_lengths)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1][0], expected[1][0])
    assert (actual[1][1:] == 0).all()


def test_placeholder_pages_are_not_written():
    static, pages, _, _ = append(DTYPES[0], retrieval_heads=())
    with_others = replace(pages, full_keys=pages.windowed_keys, full_values=pages.windowed_values)
    before = pages.windowed_keys.clone()
    fused_kv_append(
        static.queries, static.keys, static.values, None, None, None, static.layout, with_others
    )
    kept = [place for place in WINDOWED_SLOTS if place >= 0]
    for place in range(PAGES * WINDOWED_PAGE):
        if place not in kept:
            at = (place // WINDOWED_PAGE, slice(None), place % WINDOWED_PAGE)
            assert torch.equal(bits(pages.windowed_keys[at]), bits(before[at]))

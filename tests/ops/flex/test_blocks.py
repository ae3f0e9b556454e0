"""Block tables say of every block what the mask says of its entries."""

import pytest
import torch

from rtpurbo.config import AttentionRule
from rtpurbo.ops.flex.blocks import BLOCK, block_mask, padded_length

LENGTH = 6 * BLOCK


def entries(retrieves, first, sinks, window, near):
    """Keys that each query may read before any selection, including all that it could select."""
    rows, columns = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None]
    causal = columns <= rows
    local = causal & ((rows - columns < window) | (columns < sinks))
    surely = causal & ((rows - columns < near) | (columns < sinks) | (rows < first))
    # Of a local head, and of one that retrieves: what may be seen, and what is seen in any case.
    may, must = (local, causal), (local, surely)
    heads = retrieves.long().tolist()
    return torch.stack([may[head] for head in heads]), torch.stack([must[head] for head in heads])


def tiles(mask):
    return mask.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).transpose(-2, -3)


def listed(counts, indices):
    """bool [heads, rows, columns] from counts and lists."""
    rank = torch.arange(indices.shape[-1])
    table = torch.zeros(indices.shape, dtype=torch.bool)
    return table.scatter(-1, indices.long(), rank < counts[..., None])[0]


@pytest.mark.parametrize("first", [LENGTH, LENGTH - 1, LENGTH - BLOCK, LENGTH - BLOCK - 30, 0])
@pytest.mark.parametrize(
    ("sinks", "window", "near"),
    [(0, 64, 64), (4, 128, 32), (4, 129, 300), (130, 300, 256), (4, 2 * LENGTH, LENGTH)],
)
def test_block_tables_match_their_entries(first, sinks, window, near):
    retrieves = torch.tensor([False, True, False, True])
    rule = AttentionRule(
        num_sink_tokens=sinks, sliding_window=window, retrieval_window=near, block_size=16
    )
    found = block_mask(retrieves, LENGTH, first, rule, None)
    may, must = (tiles(mask) for mask in entries(retrieves, first, sinks, window, near))
    parts = listed(found.kv_num_blocks, found.kv_indices)
    full = listed(found.full_kv_num_blocks, found.full_kv_indices)
    assert not (parts & full).any()
    assert torch.equal(parts | full, may.any((-1, -2)))
    assert not (full & ~must.all((-1, -2))).any()
    # Blocks that a mask sees whole are taken whole, but where sinks and window meet in one.
    missed = must.all((-1, -2)) & ~full
    assert missed.sum() <= (len(retrieves) * LENGTH // BLOCK if sinks > BLOCK else 0)
    for name, table in (("q", parts), ("full_q", full)):
        transposed = listed(getattr(found, f"{name}_num_blocks"), getattr(found, f"{name}_indices"))
        assert torch.equal(transposed, table.transpose(-1, -2))


@pytest.mark.parametrize("length", [1, 127, 128, 129, 2048, 8111, 8192, 32440, 32768, 131072])
def test_lengths_are_whole_blocks_and_few(length):
    padded = padded_length(length)
    assert length <= padded < length + max(BLOCK, length / 16 + 1)
    assert padded % BLOCK == 0
    assert padded_length(padded) == padded


def test_a_length_and_one_a_little_shorter_are_one():
    for power in range(11, 18):
        assert padded_length(2**power) == padded_length(2**power * 99 // 100) == 2**power

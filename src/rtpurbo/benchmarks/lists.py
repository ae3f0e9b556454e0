"""Block lists of a density that is wanted, and the density of lists that are there.

*Density* is the share of the causal key blocks that a retrieval head reads, near ones included; a
block is near if any row of the tile has it, or a part of it, among its sinks or in its window.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.triton.prefill.portable import BlockLists
from rtpurbo.ops.triton.prefill.scoring import edge_slots


@dataclass(frozen=True)
class TileBlocks:
    """The blocks before each tile of query rows, where rows and keys begin at position 0.

    Attributes:
        causal: int64 [tiles], blocks that hold a key which some row may see.
        far: int64 [tiles], those of them that are not near; they follow each other.
        first_far: the number of the first one.
    """

    causal: Tensor
    far: Tensor
    first_far: int

    @classmethod
    def of(cls, length: int, rule: AttentionRule) -> TileBlocks:
        """Those of a prompt."""
        first_half = torch.arange(0, length, rule.query_block_size)
        last_rows = (first_half + rule.query_block_size).clamp(max=length) - 1
        first_far = -(-rule.num_sink_tokens // rule.block_size)
        first_near = (first_half - rule.near_window + 1).clamp(min=0) // rule.block_size
        return cls(
            last_rows // rule.block_size + 1, (first_near - first_far).clamp(min=0), first_far
        )

    @property
    def near_share(self) -> float:
        """The density if no far block is read: the least there is."""
        return 1 - float(self.far.sum()) / float(self.causal.sum())

    def wanted(self, density: float) -> Tensor:
        """Far blocks to read in each tile: the same share of them, even numbers, int64 [tiles]."""
        share = (density - self.near_share) / max(1e-9, 1 - self.near_share)
        exact = self.far.double() * min(1.0, max(0.0, share))
        # What is rounded off one tile is handed on to the next.
        pairs = (exact.cumsum(0) / 2).round().long()
        counts = 2 * pairs.diff(prepend=pairs.new_zeros(1))
        return torch.minimum(counts, self.far // 2 * 2)


def synthetic_lists(
    chunks: Sequence[tuple[int, int]],
    length: int,
    rule: AttentionRule,
    heads: int,
    density: float,
    device: torch.device,
    seed: int = 0,
) -> dict[int, BlockLists]:
    """Lists of a density: far blocks at even distances with jitter, other ones for every head.

    Args:
        chunks: the first row and the number of tiles of each list, as `block_lists` yields them.
        length: tokens of the prompt.
        rule: block, tile and window sizes.
        heads: retrieval heads.
        density: wanted; what near blocks alone exceed cannot be had.
        device: where to put them.
        seed: of the jitter.

    Returns:
        The lists by their first row.
    """
    blocks = TileBlocks.of(length, rule)
    counts, edge = blocks.wanted(density), edge_slots(rule)
    generator = torch.Generator(device).manual_seed(seed)
    made = {}
    for row, tiles in chunks:
        first_tile = row // rule.query_block_size
        chosen = slice(first_tile, first_tile + tiles)
        count = counts[chosen].to(device)
        far = blocks.far[chosen].to(device)
        width = max(2, int(count.max()))
        places = torch.arange(width, device=device)
        # One block of each stratum: so they ascend, and none comes twice.
        divisor = count.clamp(min=1)[:, None]
        begin = places * far[:, None] // divisor
        size = (places + 1) * far[:, None] // divisor - begin
        jitter = torch.rand(heads, tiles, width, generator=generator, device=device)
        numbers = blocks.first_far + begin + (jitter * size).long().minimum(size - 1)
        entries = numbers.new_zeros(1, heads, tiles, edge + width, dtype=torch.int32)
        entries[..., edge:] = numbers.where(places < count[:, None], 0)
        both = torch.stack([torch.zeros_like(count), count], -1).to(torch.int32)
        made[row] = BlockLists(
            entries,
            both.expand(1, heads, tiles, 2).contiguous(),
            edge,
            rule.block_size,
            rule.query_block_size,
        )
    return made


def listed(lists: BlockLists) -> Tensor:
    """Which places of the lists count: bool, shaped as `lists.blocks`."""
    places = torch.arange(lists.blocks.shape[-1], device=lists.blocks.device)
    edge, whole = lists.counts[..., :1], lists.counts[..., 1:]
    return (places < edge) | ((places >= lists.edge_slots) & (places < lists.edge_slots + whole))


def density_of(
    chunks: Mapping[int, BlockLists] | Iterable[tuple[int, BlockLists]],
    length: int,
    rule: AttentionRule,
) -> float:
    """The density of lists for all rows of a prompt, in the mean over heads."""
    blocks = TileBlocks.of(length, rule)
    read, heads = 0, 1
    for row, lists in chunks.items() if isinstance(chunks, Mapping) else chunks:
        heads = lists.blocks.shape[0] * lists.blocks.shape[1]
        first_tile = row // rule.query_block_size
        far = blocks.far[first_tile : first_tile + lists.blocks.shape[2]].to(lists.blocks.device)
        # Blocks that hold the edge of a window are on lists too, but are near already.
        is_far = lists.blocks >= blocks.first_far
        is_far &= lists.blocks < blocks.first_far + far[:, None]
        read += int((is_far & listed(lists)).sum())
    near = float((blocks.causal - blocks.far).sum())
    return (near + read / heads) / float(blocks.causal.sum())


def listed_keys(chunks: Mapping[int, BlockLists], head: int, rows: Tensor, length: int) -> Tensor:
    """The keys in the blocks that the tiles of some rows list: bool [rows, length].

    Args:
        chunks: the lists by their first row.
        head: which retrieval head, counted among them.
        rows: int64, of the prompt.
        length: tokens of the prompt.
    """
    starts = sorted(chunks)
    keys = torch.zeros(len(rows), length, dtype=torch.bool, device=rows.device)
    for number, row in enumerate(rows.tolist()):
        start = max(start for start in starts if start <= row)
        lists = chunks[start]
        tile = (row - start) // lists.query_block_size
        one = replace(
            lists,
            blocks=lists.blocks[:1, head : head + 1, tile : tile + 1],
            counts=lists.counts[:1, head : head + 1, tile : tile + 1],
        )
        blocks = one.blocks[listed(one)].long()
        columns = blocks[:, None] * one.block_size + torch.arange(
            one.block_size, device=rows.device
        )
        columns = columns.flatten()
        keys[number, columns[columns < length]] = True
    return keys

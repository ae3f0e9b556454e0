"""Block lists of a given density, and the density of given block lists.

*Density* is the share of the causal key blocks that a retrieval head reads, near ones included; a block is near if a
part of it is among the sinks or in the window of any query of the query block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.triton.prefill.portable import BlockLists
from rtpurbo.ops.triton.prefill.scoring import edge_slots


@dataclass(frozen=True)
class CausalBlocks:
    """Numbers of key blocks before each query block; queries and keys begin at position 0.

    Attributes:
        causal: int64 [query blocks], key blocks with a key that some query may see.
        far: int64 [query blocks], contiguous key blocks of these that are not near.
        first_far: index of the first far block.
    """

    causal: Tensor
    far: Tensor
    first_far: int

    @classmethod
    def of(cls, length: int, rule: AttentionRule) -> CausalBlocks:
        """Block counts of a prompt of `length` tokens."""
        first_queries = torch.arange(0, length, rule.query_block_size)
        last_queries = (first_queries + rule.query_block_size).clamp(max=length) - 1
        first_far = -(-rule.num_sink_tokens // rule.block_size)
        first_near = (first_queries - rule.near_window + 1).clamp(min=0) // rule.block_size
        return cls(
            last_queries // rule.block_size + 1, (first_near - first_far).clamp(min=0), first_far
        )

    @property
    def near_share(self) -> float:
        """Density without far blocks, the lowest one possible."""
        return 1 - float(self.far.sum()) / float(self.causal.sum())

    def far_blocks_read(self, density: float) -> Tensor:
        """Even number of far blocks per query block, a constant share of them: int64 [query blocks]."""
        share = (density - self.near_share) / max(1e-9, 1 - self.near_share)
        exact = self.far.double() * min(1.0, max(0.0, share))
        # Rounding errors carry over to the next query block.
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
    """Block lists of a density: evenly spaced far blocks with jitter, different for every head.

    Args:
        chunks: first query and number of query blocks of each list, as `block_lists` yields them.
        length: tokens of the prompt.
        rule: block and window sizes.
        heads: number of retrieval heads.
        density: target; the density of the near blocks alone is the lower limit.
        device: device of the lists.
        seed: seed of the jitter.

    Returns:
        Lists by their first query.
    """
    blocks = CausalBlocks.of(length, rule)
    counts, edge = blocks.far_blocks_read(density), edge_slots(rule)
    generator = torch.Generator(device).manual_seed(seed)
    made = {}
    for first_query, tiles in chunks:
        first_tile = first_query // rule.query_block_size
        chosen = slice(first_tile, first_tile + tiles)
        count = counts[chosen].to(device)
        far = blocks.far[chosen].to(device)
        width = max(2, int(count.max()))
        places = torch.arange(width, device=device)
        # One block per stratum: ascending and without duplicates.
        divisor = count.clamp(min=1)[:, None]
        begin = places * far[:, None] // divisor
        size = (places + 1) * far[:, None] // divisor - begin
        jitter = torch.rand(heads, tiles, width, generator=generator, device=device)
        numbers = blocks.first_far + begin + (jitter * size).long().minimum(size - 1)
        entries = numbers.new_zeros(1, heads, tiles, edge + width, dtype=torch.int32)
        entries[..., edge:] = numbers.where(places < count[:, None], 0)
        both = torch.stack([torch.zeros_like(count), count], -1).to(torch.int32)
        made[first_query] = BlockLists(
            entries,
            both.expand(1, heads, tiles, 2).contiguous(),
            edge,
            rule.block_size,
            rule.query_block_size,
        )
    return made


def density_of(chunks: Mapping[int, BlockLists], length: int, rule: AttentionRule) -> float:
    """Density of lists for all queries of a prompt, averaged over heads."""
    blocks = CausalBlocks.of(length, rule)
    read, heads = 0, 1
    for first_query, lists in chunks.items():
        heads = lists.blocks.shape[0] * lists.blocks.shape[1]
        first_tile = first_query // rule.query_block_size
        far = blocks.far[first_tile : first_tile + lists.blocks.shape[2]].to(lists.blocks.device)
        # Blocks at the edge of a window are listed too, but count as near.
        is_far = lists.blocks >= blocks.first_far
        is_far &= lists.blocks < blocks.first_far + far[:, None]
        read += int((is_far & lists.valid()).sum())
    near = float((blocks.causal - blocks.far).sum())
    return (near + read / heads) / float(blocks.causal.sum())


def listed_keys(
    chunks: Mapping[int, BlockLists], head: int, queries: Tensor, length: int
) -> Tensor:
    """Keys in the blocks that are listed for some queries of a retrieval head: bool [queries, length].

    Lists are given by their first query, queries as indices in the prompt, int64; `head` counts retrieval heads.
    """
    starts = sorted(chunks)
    keys = torch.zeros(len(queries), length, dtype=torch.bool, device=queries.device)
    for number, query in enumerate(queries.tolist()):
        start = max(start for start in starts if start <= query)
        lists = chunks[start]
        tile = (query - start) // lists.query_block_size
        one = replace(
            lists,
            blocks=lists.blocks[:1, head : head + 1, tile : tile + 1],
            counts=lists.counts[:1, head : head + 1, tile : tile + 1],
        )
        blocks = one.blocks[one.valid()].long()
        columns = blocks[:, None] * one.block_size + torch.arange(
            one.block_size, device=queries.device
        )
        columns = columns.flatten()
        keys[number, columns[columns < length]] = True
    return keys

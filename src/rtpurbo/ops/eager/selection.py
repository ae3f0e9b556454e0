"""Which far keys a retrieval head reads: the indexer's scores, turned into sets by dynamic top-p.

*Near* keys are the sinks and the window: always read. *Far* keys are all the others that the query
may see.

Three readings of "the smallest set whose mass reaches p" (docs/experiment-log.md compares them):

- `paper`: mass is a share of the indexer's softmax over every visible key.
- `residual`: near keys count with their exact logits, far keys with the indexer's; far keys are
  added until near mass plus selected mass reaches p. A query whose mass is local selects nothing.
- `far`: the same mixed softmax, but p of the *far* mass must be reached, whenever the far mass is
  above a floor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule, Reading
from rtpurbo.devices import has_triton


def index_scores(
    index_queries: Tensor, index_keys: Tensor, key_heads: Tensor | None = None
) -> Tensor:
    """The indexer's estimate of the logits: [batch, heads, q_len, k_len] in at least fp32.

    Args:
        index_queries: [batch, heads, q_len, index_dim].
        index_keys: [batch, num_index_keys, k_len, index_dim], perhaps kept in less bits.
        key_heads: int [heads], the entry along dim 1 of the index keys that each head reads; None if
            each has its own.
    """
    index_keys = index_keys.to(index_queries.dtype)
    if key_heads is not None:
        index_keys = index_keys[:, key_heads]
    scores = index_queries @ index_keys.transpose(-1, -2)
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def estimated_logits(
    reading: Reading, exact: Tensor, index: Tensor, near: Tensor, far: Tensor
) -> Tensor:
    """The logits whose softmax gives a reading its masses; minus infinity at keys not visible.

    Args:
        reading: which reading.
        exact: exact attention logits [batch, heads, q_len, k_len]; read at near keys only.
        index: the indexer's scores, same shape.
        near: bool, broadcastable to the same shape.
        far: likewise.
    """
    mixed = index if reading == "paper" else torch.where(near, exact, index)
    return mixed.masked_fill(~(near | far), -torch.inf)


def masses(logits: Tensor) -> Tensor:
    """Softmax over the last dimension, where a row without any key has mass 0, not NaN."""
    return logits.softmax(-1).nan_to_num(0.0)


def target_mass(
    rule: AttentionRule, mass: Tensor, near: Tensor, far: Tensor
) -> tuple[Tensor, Tensor]:
    """The masses that compete for selection, and how much of them each row must reach.

    Returns:
        Candidate masses [batch, heads, q_len, k_len] and targets [batch, heads, q_len].
    """
    if rule.reading == "paper":
        return mass, torch.full_like(mass[..., 0], rule.top_p)
    candidates = mass * far
    if rule.reading == "residual":
        return candidates, rule.top_p - (mass * near).sum(-1)
    far_mass = candidates.sum(-1)
    return candidates, torch.where(far_mass > rule.far_floor, rule.top_p * far_mass, 0.0)


def smallest_set(mass: Tensor, target: Tensor) -> Tensor:
    """Dynamic top-p: the fewest entries whose sum reaches the target; ties go to the earlier entry.

    Args:
        mass: non-negative [..., entries].
        target: [...]; at or below 0 selects nothing, above the sum selects everything that has
            mass.

    Returns:
        bool [..., entries].
    """
    descending, order = torch.sort(mass, dim=-1, descending=True, stable=True)
    reached_before = descending.cumsum(-1) - descending
    keep = (reached_before < target[..., None]) & (descending > 0)
    return torch.zeros_like(keep).scatter(-1, order, keep)


def heaviest(mass: Tensor, count: int) -> Tensor:
    """The `count` entries of most mass along the last dimension, fewer if fewer have any: bool."""
    values, indices = mass.topk(min(count, mass.shape[-1]), dim=-1)
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, indices, values > 0)


class SetFinder(NamedTuple):
    """How the two sets are found: by sorting here, by a kernel where sorting is slow."""

    smallest_set: Callable[[Tensor, Tensor], Tensor]
    heaviest: Callable[[Tensor, int], Tensor]


SORTING = SetFinder(smallest_set, heaviest)


def set_finder(device: torch.device, dtype: torch.dtype) -> SetFinder:
    """How sets of masses on a device are found.

    A GPU sorts the rows of a layer for longer than all the rest of it takes. Its kernel finds the
    same sets in fp32, but for entries of equal mass, which come together, and sums that round otherwise.
    """
    if device.type != "cuda" or dtype == torch.float64 or not has_triton():
        return SORTING
    # Without Triton there is none of this.
    from rtpurbo.ops.triton import sets

    return SetFinder(sets.top_set, sets.heaviest)


def block_ids(key_positions: Tensor, block_size: int) -> Tensor:
    """The block of each key, int64 [batch, k_len]; empty slots, which have no mass, get block 0."""
    return key_positions.clamp(min=0) // block_size


def sum_blocks(mass: Tensor, blocks: Tensor, num_blocks: int | None = None) -> Tensor:
    """Mass of each block: [batch, heads, q_len, num_blocks] from [batch, heads, q_len, k_len].

    Their number, where it is known, saves a GPU from being waited for.
    """
    if num_blocks is None:
        num_blocks = int(blocks.max()) + 1 if blocks.numel() else 1
    ids = blocks[:, None, None, :].expand(mass.shape)
    return mass.new_zeros(*mass.shape[:-1], num_blocks).scatter_add(-1, ids, mass)


def spread_blocks(chosen: Tensor, blocks: Tensor) -> Tensor:
    """The keys of the chosen blocks: bool [batch, heads, q_len, k_len]."""
    ids = blocks[:, None, None, :].expand(*chosen.shape[:-1], blocks.shape[-1])
    return chosen.gather(-1, ids)


def select_for_rows(
    rule: AttentionRule,
    logits: Tensor,
    near: Tensor,
    far: Tensor,
    key_positions: Tensor,
    num_blocks: int | None = None,
) -> Tensor:
    """Far keys that each row reads, each row its own set: bool [batch, heads, q_len, k_len].

    Args:
        rule: reading, p, granularity and block size.
        logits: from `estimated_logits`.
        near: bool, broadcastable to the logits.
        far: likewise.
        key_positions: int64 [batch, k_len].
        num_blocks: blocks up to the last position, where they are known.
    """
    if rule.top_p >= 1:
        return far.expand(logits.shape)
    finder = set_finder(logits.device, logits.dtype)
    candidates, target = target_mass(rule, masses(logits), near, far)
    # A share of the far mass alone: beside a near mass of nearly 1 it would be lost to rounding.
    far_shares = masses(logits.masked_fill(~far, -torch.inf))
    if rule.granularity == "token":
        chosen = finder.smallest_set(candidates, target)
        return (chosen | finder.heaviest(far_shares, rule.min_tokens)) & far
    blocks = block_ids(key_positions, rule.block_size)
    chosen = finder.smallest_set(sum_blocks(candidates, blocks, num_blocks), target)
    floor = -(-rule.min_tokens // rule.block_size)
    chosen |= finder.heaviest(sum_blocks(far_shares, blocks, num_blocks), floor)
    return spread_blocks(chosen, blocks) & far


def select_for_tiles(
    rule: AttentionRule,
    logits: Tensor,
    near: Tensor,
    far: Tensor,
    key_positions: Tensor,
    rows_after: int = 0,
) -> Tensor:
    """Far keys under one block list for each tile of `query_block_size` consecutive rows.

    A block is on the list if any row of the tile gives it at least `row_share` of its estimated
    mass. Peaks decide, not means: the mean loses the few rows that retrieve
    (docs/experiment-log.md). With a `row_stride` only every so many rows are asked, counted back
    from the last row of the call. Arguments as in `select_for_rows`, and how many rows of the call
    follow these.
    """
    blocks = block_ids(key_positions, rule.block_size)
    if rule.prefill_mode == "row_share":
        shares = sum_blocks(masses(logits) * far, blocks)
    else:
        shares = peak_shares(logits, near, far, blocks)
    to_end = torch.arange(shares.shape[2] - 1, -1, -1, device=shares.device) + rows_after
    shares = shares.masked_fill((to_end % rule.row_stride > 0)[:, None], 0.0)
    tiles = [
        tile.amax(2, keepdim=True).expand(tile.shape)
        for tile in shares.split(rule.query_block_size, 2)
    ]
    return spread_blocks(torch.cat(tiles, 2) >= rule.row_share, blocks) & far


def peak_shares(logits: Tensor, near: Tensor, far: Tensor, blocks: Tensor) -> Tensor:
    """What the strongest far key of each block holds, of a mass in which every block counts by it.

    Near keys count in full. One exponential a block instead of one a key: that is what a kernel
    saves. Arguments as in `select_for_rows`, with the `block_ids` of the keys.

    Returns:
        [batch, heads, q_len, num_blocks].
    """
    num_blocks = int(blocks.max()) + 1 if blocks.numel() else 1
    ids = blocks[:, None, None, :].expand(logits.shape)
    peaks = logits.new_full((*logits.shape[:-1], num_blocks), -torch.inf).scatter_reduce(
        -1, ids, logits.masked_fill(~far, -torch.inf), "amax"
    )
    near_mass = logits.masked_fill(~near, -torch.inf).logsumexp(-1, keepdim=True)
    return masses(torch.cat([near_mass, peaks], -1))[..., 1:]

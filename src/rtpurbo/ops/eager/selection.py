"""Selection of the far keys of retrieval heads: dynamic top-p over index scores.

*Near* keys are sinks and window, which are always read. *Far* keys are all other visible keys.

The reading is the distribution that "the smallest set whose mass reaches p" applies to
(docs/experiment-log.md compares them):

- `paper`: the indexer's softmax over all visible keys.
- `residual`: a softmax of exact logits for near keys and index scores for far keys; far keys are added until
  near plus selected mass reaches p. A query with enough near mass selects nothing.
- `far`: the same softmax, but the selection must reach p of the *far* mass, if that exceeds a floor.
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
    """Index scores, the indexer's estimate of the logits: [batch, heads, q_len, k_len] in at least fp32.

    Args:
        index_queries: [batch, heads, q_len, index_dim].
        index_keys: [batch, num_index_keys, k_len, index_dim], in any dtype, such as float8.
        key_heads: int [heads], index along dim 1 of the index keys for each head; None if each head
            has its own.
    """
    index_keys = index_keys.to(index_queries.dtype)
    if key_heads is not None:
        index_keys = index_keys[:, key_heads]
    scores = index_queries @ index_keys.transpose(-1, -2)
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def estimated_logits(
    reading: Reading, exact: Tensor, index: Tensor, near: Tensor, far: Tensor
) -> Tensor:
    """Logits of the distribution that top-p applies to; minus infinity for keys that are not visible.

    Args:
        reading: see the module.
        exact: exact attention logits [batch, heads, q_len, k_len]; only those of near keys are read.
        index: index scores, same shape.
        near: bool, broadcastable to the same shape.
        far: bool, broadcastable to the same shape.
    """
    mixed = index if reading == "paper" else torch.where(near, exact, index)
    return mixed.masked_fill(~(near | far), -torch.inf)


def masses(logits: Tensor) -> Tensor:
    """Softmax over the last dimension; 0, not NaN, for queries without keys."""
    return logits.softmax(-1).nan_to_num(0.0)


def target_mass(
    rule: AttentionRule, mass: Tensor, near: Tensor, far: Tensor
) -> tuple[Tensor, Tensor]:
    """Masses of the candidates, and the target mass of each query.

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
    """Smallest set of entries whose sum reaches the target (dynamic top-p); ties go to the earlier entry.

    Args:
        mass: non-negative [..., entries].
        target: [...]; 0 or less selects nothing, more than the sum every entry with mass.

    Returns:
        bool [..., entries].
    """
    descending, order = torch.sort(mass, dim=-1, descending=True, stable=True)
    reached_before = descending.cumsum(-1) - descending
    keep = (reached_before < target[..., None]) & (descending > 0)
    return torch.zeros_like(keep).scatter(-1, order, keep)


def top_k(mass: Tensor, count: int) -> Tensor:
    """Mask of the `count` largest entries along the last dimension; entries without mass are left out."""
    values, indices = mass.topk(min(count, mass.shape[-1]), dim=-1)
    return torch.zeros_like(mass, dtype=torch.bool).scatter(-1, indices, values > 0)


class SetFinder(NamedTuple):
    """Implementations of both sets: sorting, or a kernel on GPUs."""

    smallest_set: Callable[[Tensor, Tensor], Tensor]
    top_k: Callable[[Tensor, int], Tensor]


SORTING = SetFinder(smallest_set, top_k)


def set_finder(device: torch.device, dtype: torch.dtype) -> SetFinder:
    """Implementation of the sets for a device and dtype.

    On a GPU, sorting would take longer than the rest of the layer. The kernel finds the same sets in fp32, except
    that entries of equal mass are taken together and that sums round differently.
    """
    if device.type != "cuda" or dtype == torch.float64 or not has_triton():
        return SORTING
    # Needs Triton.
    from rtpurbo.ops.triton import sets

    return SetFinder(sets.top_set, sets.top_k)


def block_ids(key_positions: Tensor, block_size: int) -> Tensor:
    """Block index of each key, int64 [batch, k_len]; 0 for empty slots, which have no mass."""
    return key_positions.clamp(min=0) // block_size


def sum_blocks(mass: Tensor, blocks: Tensor, num_blocks: int | None = None) -> Tensor:
    """Mass of each block: [batch, heads, q_len, num_blocks] from [batch, heads, q_len, k_len].

    A known `num_blocks` avoids a synchronisation with the GPU.
    """
    if num_blocks is None:
        num_blocks = int(blocks.max()) + 1 if blocks.numel() else 1
    ids = blocks[:, None, None, :].expand(mass.shape)
    return mass.new_zeros(*mass.shape[:-1], num_blocks).scatter_add(-1, ids, mass)


def spread_blocks(chosen: Tensor, blocks: Tensor) -> Tensor:
    """Mask of the keys in the chosen blocks: bool [batch, heads, q_len, k_len]."""
    ids = blocks[:, None, None, :].expand(*chosen.shape[:-1], blocks.shape[-1])
    return chosen.gather(-1, ids)


def select_per_query(
    rule: AttentionRule,
    logits: Tensor,
    near: Tensor,
    far: Tensor,
    key_positions: Tensor,
    num_blocks: int | None = None,
) -> Tensor:
    """Far keys selected by each query for itself: bool [batch, heads, q_len, k_len].

    Args:
        rule: reading, p, granularity and block size.
        logits: from `estimated_logits`.
        near: bool, broadcastable to the logits.
        far: bool, broadcastable to the same shape.
        key_positions: int64 [batch, k_len].
        num_blocks: blocks up to the last position, if known.
    """
    if rule.top_p >= 1:
        return far.expand(logits.shape)
    finder = set_finder(logits.device, logits.dtype)
    candidates, target = target_mass(rule, masses(logits), near, far)
    # Shares of the far mass only: next to a near mass of nearly 1 they would round to 0.
    far_shares = masses(logits.masked_fill(~far, -torch.inf))
    if rule.granularity == "token":
        chosen = finder.smallest_set(candidates, target)
        return (chosen | finder.top_k(far_shares, rule.min_tokens)) & far
    blocks = block_ids(key_positions, rule.block_size)
    chosen = finder.smallest_set(sum_blocks(candidates, blocks, num_blocks), target)
    floor = -(-rule.min_tokens // rule.block_size)
    chosen |= finder.top_k(sum_blocks(far_shares, blocks, num_blocks), floor)
    return spread_blocks(chosen, blocks) & far


def select_per_query_block(
    rule: AttentionRule,
    logits: Tensor,
    near: Tensor,
    far: Tensor,
    key_positions: Tensor,
    queries_after: int = 0,
) -> Tensor:
    """Far keys selected by one block list per block of `query_block_size` consecutive queries.

    A key block is listed if any query of the query block gives it at least `row_share` of its estimated mass. The
    maximum decides, since the mean loses the few queries that retrieve (docs/experiment-log.md). With
    `row_stride`, only every `row_stride`-th query is scored, counted back from the last one of the call.
    Arguments as in `select_per_query`; `queries_after` is the number of later queries in the call.
    """
    blocks = block_ids(key_positions, rule.block_size)
    if rule.prefill_mode == "row_share":
        shares = sum_blocks(masses(logits) * far, blocks)
    else:
        shares = peak_shares(logits, near, far, blocks)
    to_end = torch.arange(shares.shape[2] - 1, -1, -1, device=shares.device) + queries_after
    shares = shares.masked_fill((to_end % rule.row_stride > 0)[:, None], 0.0)
    tiles = [
        tile.amax(2, keepdim=True).expand(tile.shape)
        for tile in shares.split(rule.query_block_size, 2)
    ]
    return spread_blocks(torch.cat(tiles, 2) >= rule.row_share, blocks) & far


def peak_shares(logits: Tensor, near: Tensor, far: Tensor, blocks: Tensor) -> Tensor:
    """Share of each block's strongest far key in the sum of near mass and strongest far keys of all blocks.

    Needs one exponential per block in place of one per key, which the kernel saves. Arguments as in
    `select_per_query`, with the `block_ids` of the keys.

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

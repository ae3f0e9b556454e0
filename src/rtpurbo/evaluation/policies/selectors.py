"""Selections of far keys that replace the indexer's top-p."""

from __future__ import annotations

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops import SelectionQueries, Selector
from rtpurbo.ops.eager.selection import block_ids, estimated_logits, select_per_query, spread_blocks

PAGE_SIZE = 16
"""Tokens per page of Quest, as in its evaluation."""


def top_k(far_tokens: int) -> Selector:
    """Returns the selection of the far tokens with the highest index scores, as many for every query."""

    def select(queries: SelectionQueries) -> Tensor:
        scores = queries.score_index().masked_fill(~queries.far, -torch.inf)
        return highest(scores, far_tokens)

    return select


def oracle_top_p(rule: AttentionRule) -> Selector:
    """Returns the selection of a rule by exact logits, which cost as much as dense attention."""

    def select(queries: SelectionQueries) -> Tensor:
        logits = estimated_logits(
            rule.reading, queries.logits, queries.logits, queries.near, queries.far
        )
        return select_per_query(rule, logits, queries.near, queries.far, queries.key_positions)

    return select


def highest(scores: Tensor, count: int) -> Tensor:
    """Returns a mask of the `count` highest finite entries along the last dimension."""
    values, indices = scores.topk(min(count, scores.shape[-1]), dim=-1)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter(-1, indices, values > -torch.inf)


def quest(far_tokens: int, page_size: int = PAGE_SIZE) -> Selector:
    """Returns Quest's selection (arXiv 2406.10774) of the pages of keys with the highest bounds of their scores.

    The bound of a page sums, over the dimensions of a head, the larger of query times the page's minimum key
    element and query times its maximum. The number of tokens to read is rounded up to whole pages, which are
    aligned to position 0.
    """
    num_pages = -(-far_tokens // page_size)

    def select(asked: SelectionQueries) -> Tensor:
        pages = block_ids(asked.key_positions, page_size)
        least, greatest = page_bounds(asked.key_states, asked.key_positions, pages)
        # In half precision, different bounds could be equal.
        precise = torch.promote_types(least.dtype, torch.float32)
        queries, least, greatest = (
            part.to(precise) for part in (asked.query_states, least, greatest)
        )
        # The sum of max(q * least, q * greatest); the sign of q decides which of the two is larger.
        bounds = queries.clamp(min=0) @ greatest.transpose(-1, -2)
        bounds += queries.clamp(max=0) @ least.transpose(-1, -2)
        has_far = torch.zeros_like(bounds[:, :1], dtype=torch.int32).scatter_reduce(
            -1, pages[:, None, None].expand(asked.far.shape), asked.far.int(), "amax"
        )
        chosen = highest(bounds.masked_fill(has_far == 0, -torch.inf), num_pages)
        return spread_blocks(chosen, pages) & asked.far

    return select


def page_bounds(keys: Tensor, positions: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the elementwise minimum and maximum of the keys of each page.

    Args:
        keys: [batch, heads, k_len, head_dim].
        positions: int64 [batch, k_len], -1 where there is no key.
        pages: int64 [batch, k_len], page of each key.

    Returns:
        Two tensors [batch, heads, pages, head_dim]; 0 where a page has no key.
    """
    num_pages = int(pages.max()) + 1 if pages.numel() else 1
    shape = (*keys.shape[:2], num_pages, keys.shape[3])
    ids = pages[:, None, :, None].expand(keys.shape)
    empty = (positions < 0)[:, None, :, None]
    least, greatest = (
        keys.new_full(shape, -extreme)
        .scatter_reduce(2, ids, keys.masked_fill(empty, -extreme), how)
        .nan_to_num(posinf=0.0, neginf=0.0)
        for extreme, how in ((-torch.inf, "amin"), (torch.inf, "amax"))
    )
    return least, greatest

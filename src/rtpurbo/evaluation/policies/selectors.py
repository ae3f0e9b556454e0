"""Selections of far keys that replace the indexer's top-p."""

from __future__ import annotations

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops import SelectionQueries, Selector
from rtpurbo.ops.eager.selection import estimated_logits, select_per_query


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

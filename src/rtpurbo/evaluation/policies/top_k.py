"""A fixed number of far tokens for every row: what deciding by mass is worth."""

from __future__ import annotations

import torch
from torch import Tensor

from rtpurbo.evaluation.policies.policy import BudgetPolicy
from rtpurbo.ops import SelectionQueries


class TopKSelector:
    """The far tokens of highest index scores.

    Args:
        far_tokens: how many.
    """

    def __init__(self, far_tokens: int) -> None:
        self.far_tokens = far_tokens

    def __call__(self, rows: SelectionQueries) -> Tensor:
        """The far keys of each row: bool [batch, heads, rows, k_len]."""
        scores = rows.score_index().masked_fill(~rows.far, -torch.inf)
        return highest(scores, self.far_tokens)


def highest(scores: Tensor, count: int) -> Tensor:
    """The `count` highest entries along the last dimension, minus infinity never: bool."""
    values, indices = scores.topk(min(count, scores.shape[-1]), dim=-1)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter(-1, indices, values > -torch.inf)


class TopK(BudgetPolicy):
    """As many far tokens as rtpurbo reads on average, the same number for every query."""

    def selector(self, far_tokens: int) -> TopKSelector:
        """Returns the selection of that many far tokens."""
        return TopKSelector(far_tokens)


POLICY = TopK(
    "top-k",
    "the same number of far tokens for every row, by the index; rtpurbo's mean budget",
)

"""Selection of a fixed number of far tokens, to compare with top-p."""

from __future__ import annotations

import torch
from torch import Tensor

from rtpurbo.evaluation.policies.policy import BudgetPolicy
from rtpurbo.ops import SelectionQueries


class TopKSelector:
    """Selection of the far tokens with the highest index scores.

    Args:
        far_tokens: number of tokens.
    """

    def __init__(self, far_tokens: int) -> None:
        self.far_tokens = far_tokens

    def __call__(self, rows: SelectionQueries) -> Tensor:
        """Returns the selected far keys of each query: bool [batch, heads, queries, k_len]."""
        scores = rows.score_index().masked_fill(~rows.far, -torch.inf)
        return highest(scores, self.far_tokens)


def highest(scores: Tensor, count: int) -> Tensor:
    """Returns a mask of the `count` highest finite entries along the last dimension."""
    values, indices = scores.topk(min(count, scores.shape[-1]), dim=-1)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    return chosen.scatter(-1, indices, values > -torch.inf)


class TopK(BudgetPolicy):
    """The mean number of far tokens that `rtpurbo` reads, for every query."""

    def selector(self, far_tokens: int) -> TopKSelector:
        """Returns the selection of that many far tokens."""
        return TopKSelector(far_tokens)


POLICY = TopK(
    "top-k",
    "the same number of far tokens for every query, by the index; rtpurbo's mean budget",
)

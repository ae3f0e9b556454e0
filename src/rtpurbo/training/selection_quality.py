"""Logits of queries, and the quality of their selection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.eager.divergence import forward_divergence, near_and_far
from rtpurbo.ops.eager.selection import estimated_logits, masses, select_per_query
from rtpurbo.ops.eager.visibility import query_chunks
from rtpurbo.ops.sinks import with_sink_column
from rtpurbo.training.capture import CapturedHeads


def queries_with_far_keys(positions: Tensor, rule: AttentionRule) -> Tensor:
    """Returns the ascending positions of queries that have far keys to select.

    Args:
        positions: int64 [length], position of each query in its document.
        rule: sinks and window, beyond which keys are far.
    """
    return (positions >= rule.num_sink_tokens + rule.near_window).nonzero()[:, 0]


def query_logits(
    seen: CapturedHeads, query_positions: Tensor, rule: AttentionRule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns exact and estimated logits of some queries [1, heads, queries, length], and the near and far masks.

    For a model with learned sinks, all have an additional first column: the sink, which is near.
    """
    masks = near_and_far(query_positions, seen.starts, rule.near_window, rule.num_sink_tokens)
    near, far = (mask[None, None] for mask in masks)
    exact = seen.logits(query_positions)
    estimate = estimated_logits(rule.reading, exact, seen.index_scores(query_positions), near, far)
    return with_sink_column(exact, estimate, near, far, seen.sinks)


@dataclass
class SelectionQuality:
    """Quality and size of a selection, mean over queries: tensors [heads].

    Attributes:
        recall: attention recall, near keys included.
        tokens: selected far tokens.
        oracle_tokens: far tokens that exact scores select under the same rule.
        divergence: loss of stage 1.
    """

    recall: Tensor
    tokens: Tensor
    oracle_tokens: Tensor
    divergence: Tensor


@torch.no_grad()
def selection_quality(
    seen: CapturedHeads, query_positions: Tensor, rule: AttentionRule
) -> SelectionQuality:
    """Compares the indexers' selection with that of exact scores for some queries, in chunks of bounded memory."""
    total = torch.zeros(4, len(seen.names), device=seen.keys.device)
    for chunk in query_chunks(query_positions.numel(), len(seen.names) * seen.keys.shape[2]):
        exact, estimate, near, far = query_logits(seen, query_positions[chunk], rule)
        exact = exact.masked_fill(~(near | far), -torch.inf)
        positions = F.pad(seen.positions, (near.shape[-1] - seen.positions.shape[-1], 0))
        selected = select_per_query(rule, estimate, near, far, positions)
        oracle = select_per_query(rule, exact, near, far, positions)
        visible = exact.masked_fill(~(near | far), 0.0)
        figures = (
            (masses(exact) * (near | selected)).sum(-1),
            selected.sum(-1).float(),
            oracle.sum(-1).float(),
            forward_divergence(visible, estimate, near | far),
        )
        total += torch.stack([values[0].sum(-1).float() for values in figures])
    return SelectionQuality(*(total / query_positions.numel()).unbind())

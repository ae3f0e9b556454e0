"""The loss of stage 1 and the figures that tell whether it helps."""

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


def rows_with_far_keys(positions: Tensor, rule: AttentionRule) -> Tensor:
    """Query rows that have anything to select, ascending.

    Args:
        positions: int64 [length], of each row in its document.
        rule: sinks and window, beyond which keys are far.
    """
    return (positions >= rule.num_sink_tokens + rule.near_window).nonzero()[:, 0]


def row_logits(
    seen: CapturedHeads, rows: Tensor, rule: AttentionRule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact and estimated logits of some rows [1, heads, rows, length], and the near and far masks.

    Of a model with learned sinks, all have one column more, the first: the sink, which is near.
    """
    masks = near_and_far(rows, seen.starts, rule.near_window, rule.num_sink_tokens)
    near, far = (mask[None, None] for mask in masks)
    exact = seen.logits(rows)
    estimate = estimated_logits(rule.reading, exact, seen.index_scores(rows), near, far)
    return with_sink_column(exact, estimate, near, far, seen.sinks)


def indexer_loss(seen: CapturedHeads, rows: Tensor, rule: AttentionRule) -> Tensor:
    """Forward KL between the heads' attention and the indexers', mean over rows, one value a head: [heads]."""
    exact, estimate, near, far = row_logits(seen, rows, rule)
    return forward_divergence(exact, estimate, near | far).mean(-1)[0]


@dataclass
class SelectionQuality:
    """What a selection keeps and costs, mean over rows: tensors [heads].

    Attributes:
        recall: attention mass on what would be read (near keys included).
        tokens: far tokens selected.
        oracle_tokens: far tokens that exact scores would select under the same rule.
        divergence: the loss.
    """

    recall: Tensor
    tokens: Tensor
    oracle_tokens: Tensor
    divergence: Tensor


@torch.no_grad()
def selection_quality(seen: CapturedHeads, rows: Tensor, rule: AttentionRule) -> SelectionQuality:
    """Compares the indexers' selection with the oracle's on some rows, so many at a time as bound the memory."""
    total = torch.zeros(4, len(seen.names), device=seen.keys.device)
    for chunk in query_chunks(rows.numel(), len(seen.names) * seen.keys.shape[2]):
        exact, estimate, near, far = row_logits(seen, rows[chunk], rule)
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
    return SelectionQuality(*(total / rows.numel()).unbind())

"""The loss of stage 1 and the figures that tell whether it helps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.eager.selection import estimated_logits, masses, select_for_rows
from rtpurbo.ops.eager.visibility import causal_mask, near_mask
from rtpurbo.training.capture import CapturedHeads


def forward_divergence(teacher_logits: Tensor, student_logits: Tensor, visible: Tensor) -> Tensor:
    """Forward KL of each row between two distributions over the visible keys (paper: Eq. 6), in nats.

    Args:
        teacher_logits: [batch, heads, rows, k_len].
        student_logits: likewise; gradients flow here.
        visible: bool, broadcastable to them.

    Returns:
        [batch, heads, rows], at least 0.
    """
    teacher = teacher_logits.masked_fill(~visible, -torch.inf).log_softmax(-1)
    student = student_logits.masked_fill(~visible, -torch.inf).log_softmax(-1)
    difference = torch.where(visible, teacher - student, 0.0)
    return (teacher.exp() * difference).sum(-1)


def rows_with_far_keys(seen: CapturedHeads, rule: AttentionRule) -> Tensor:
    """Query rows that have anything to select."""
    return (seen.positions[0] >= rule.num_sink_tokens + rule.sliding_window).nonzero()[:, 0]


def row_logits(
    seen: CapturedHeads, rows: Tensor, rule: AttentionRule
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact and estimated logits of some rows [1, heads, rows, length], and the near and far masks."""
    positions = seen.positions[:, rows]
    near = near_mask(positions, seen.positions, rule.sliding_window, rule.num_sink_tokens)
    far = causal_mask(positions, seen.positions) & ~near
    exact = seen.logits(rows)
    return (
        exact,
        estimated_logits(rule.reading, exact, seen.index_scores(rows), near, far),
        near,
        far,
    )


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
    """Compares the indexers' selection with the oracle's on some rows."""
    exact, estimate, near, far = row_logits(seen, rows, rule)
    exact = exact.masked_fill(~(near | far), -torch.inf)
    selected = select_for_rows(rule, estimate, near, far, seen.positions)
    oracle = select_for_rows(rule, exact, near, far, seen.positions)
    return SelectionQuality(
        (masses(exact) * (near | selected)).sum(-1).mean(-1)[0],
        selected.sum(-1).float().mean(-1)[0],
        oracle.sum(-1).float().mean(-1)[0],
        forward_divergence(exact.masked_fill(~(near | far), 0.0), estimate, near | far).mean(-1)[0],
    )

"""Selection quality on held-out sequences, measured during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.config import AttentionRule
from rtpurbo.ops.eager.divergence import forward_divergence, near_and_far
from rtpurbo.ops.eager.selection import estimated_logits, masses, select_per_query
from rtpurbo.ops.eager.visibility import query_chunks
from rtpurbo.ops.sinks import with_sink_column
from rtpurbo.training.capture import CapturedHeads, capture_heads, run_backbone
from rtpurbo.training.sequences import TrainingSequence

PROBE_QUERIES = 128
FIGURES = ("recall", "tokens", "oracle_tokens", "divergence")


class Probe:
    """Repeated measurement of the indexers' selection on the same sequences.

    Args:
        model: sparse.
        sequences: held-out sequences.
        on_student: use states of the sparse model instead of the dense one's.
        keep: keep the states of all heads; False runs the model for each measurement and frees the
            states of each layer after it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sequences: Sequence[TrainingSequence],
        *,
        on_student: bool = False,
        keep: bool = True,
    ) -> None:
        self.model = model
        self.sequences = sequences
        self.on_student = on_student
        self._kept: list[list[CapturedHeads]] | None = None
        if keep:
            self._kept = [
                capture_heads(
                    model,
                    sequence.input_ids,
                    dense=not on_student,
                    query_positions=torch.cat(self._positions(sequence)).unique(),
                )
                for sequence in sequences
            ]

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Returns the selection quality, mean over sequences, queries and heads.

        Returns:
            `FIGURES`; `answer_recall`, of queries that predict an answer, if there are any; and `by_head`,
            the figures of each head.
        """
        by_head: dict[str, dict[str, float]] = {}
        answer_recalls: list[float] = []
        rule: AttentionRule = self.model.rtpurbo_config.attention
        for number, sequence in enumerate(self.sequences):
            positions, answer_positions = self._positions(sequence)

            def observe(
                seen: CapturedHeads,
                positions: Tensor = positions,
                answer_positions: Tensor = answer_positions,
            ) -> None:
                quality = selection_quality(seen, positions, rule)
                values = {name: quality[name].tolist() for name in FIGURES}
                for index, (layer, head) in enumerate(seen.names):
                    entry = by_head.setdefault(f"{layer}.{head}", dict.fromkeys(FIGURES, 0.0))
                    for name in FIGURES:
                        entry[name] += values[name][index] / len(self.sequences)
                if answer_positions.numel():
                    recall = selection_quality(seen, answer_positions, rule)["recall"]
                    answer_recalls.extend(recall.tolist())

            if self._kept is None:
                run_backbone(self.model, [sequence.input_ids], observe, dense=not self.on_student)
            else:
                for seen in self._kept[number]:
                    observe(seen)
        figures: dict[str, Any] = {
            name: sum(entry[name] for entry in by_head.values()) / max(1, len(by_head))
            for name in FIGURES
        }
        if answer_recalls:
            figures["answer_recall"] = sum(answer_recalls) / len(answer_recalls)
        return {**figures, "by_head": by_head}

    def _positions(self, sequence: TrainingSequence) -> tuple[Tensor, Tensor]:
        """Positions of the measured queries: some that have far keys, and those that predict the answer."""
        rule: AttentionRule = self.model.rtpurbo_config.attention
        length, device = len(sequence.input_ids), self.model.device
        positions = queries_with_far_keys(torch.arange(length, device=device), rule)
        answers = torch.arange(length - 1 - sequence.num_answer_tokens, length - 1, device=device)
        return positions[:: max(1, positions.numel() // PROBE_QUERIES)].contiguous(), answers


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


@torch.no_grad()
def selection_quality(
    seen: CapturedHeads, query_positions: Tensor, rule: AttentionRule
) -> dict[str, Tensor]:
    """Compares the indexers' selection with that of exact scores for some queries, in chunks of bounded memory.

    Returns:
        `FIGURES` of each head, mean over queries: attention recall, near keys included; selected far tokens; those
        that exact scores select under the same rule; and the loss of stage 1.
    """
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
    return dict(zip(FIGURES, total / query_positions.numel(), strict=True))

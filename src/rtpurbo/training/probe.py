"""Selection quality on held-out sequences, measured during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.config import AttentionRule
from rtpurbo.training.capture import CapturedHeads, capture_heads, run_backbone
from rtpurbo.training.selection_quality import queries_with_far_keys, selection_quality
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
                values = {name: getattr(quality, name).tolist() for name in FIGURES}
                for index, (layer, head) in enumerate(seen.names):
                    entry = by_head.setdefault(f"{layer}.{head}", dict.fromkeys(FIGURES, 0.0))
                    for name in FIGURES:
                        entry[name] += values[name][index] / len(self.sequences)
                if answer_positions.numel():
                    recall = selection_quality(seen, answer_positions, rule).recall
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

"""What the indexers select on held-out sequences, watched while they learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.config import AttentionRule
from rtpurbo.training.capture import CapturedHeads, capture_heads, run_backbone
from rtpurbo.training.indexer_loss import rows_with_far_keys, selection_quality
from rtpurbo.training.sequences import TrainingSequence

PROBE_ROWS = 128
FIGURES = ("recall", "tokens", "oracle_tokens", "divergence")


class Probe:
    """Measures the selection of a model's indexers, again and again on the same sequences.

    Args:
        model: sparse.
        sequences: held out from training.
        on_student: states of the sparse model itself instead of the dense one's.
        keep: hold the states of all heads; else the model runs at every look, and each layer's are
            forgotten as soon as it has passed.
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
                    rows=torch.cat(self._rows(sequence)).unique(),
                )
                for sequence in sequences
            ]

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """Selection quality, mean over sequences, rows and heads.

        Returns:
            `FIGURES`; `answer_recall`, of rows that answer a question, if there are any; and
            `by_head`, the figures of each head.
        """
        by_head: dict[str, dict[str, float]] = {}
        answer_recalls: list[float] = []
        rule: AttentionRule = self.model.rtpurbo_config.attention
        for number, sequence in enumerate(self.sequences):
            rows, answer_rows = self._rows(sequence)

            def look(
                seen: CapturedHeads, rows: Tensor = rows, answer_rows: Tensor = answer_rows
            ) -> None:
                quality = selection_quality(seen, rows, rule)
                values = {name: getattr(quality, name).tolist() for name in FIGURES}
                for place, (layer, head) in enumerate(seen.names):
                    entry = by_head.setdefault(f"{layer}.{head}", dict.fromkeys(FIGURES, 0.0))
                    for name in FIGURES:
                        entry[name] += values[name][place] / len(self.sequences)
                if answer_rows.numel():
                    recall = selection_quality(seen, answer_rows, rule).recall
                    answer_recalls.extend(recall.tolist())

            if self._kept is None:
                run_backbone(self.model, [sequence.input_ids], look, dense=not self.on_student)
            else:
                for seen in self._kept[number]:
                    look(seen)
        figures: dict[str, Any] = {
            name: sum(entry[name] for entry in by_head.values()) / max(1, len(by_head))
            for name in FIGURES
        }
        if answer_recalls:
            figures["answer_recall"] = sum(answer_recalls) / len(answer_recalls)
        return {**figures, "by_head": by_head}

    def _rows(self, sequence: TrainingSequence) -> tuple[Tensor, Tensor]:
        """Rows of a sequence on which selection is measured: some that have far keys, and those that answer."""
        rule: AttentionRule = self.model.rtpurbo_config.attention
        length, device = len(sequence.input_ids), self.model.device
        rows = rows_with_far_keys(torch.arange(length, device=device), rule)
        answers = torch.arange(length - 1 - sequence.num_answer_tokens, length - 1, device=device)
        return rows[:: max(1, rows.numel() // PROBE_ROWS)].contiguous(), answers

"""Training step of stage 1 on a model with random weights: all queries, by kernels or in chunks (eager)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rtpurbo.benchmarks.session import Session
from rtpurbo.benchmarks.timing import Call, Measurement, PartTimer
from rtpurbo.benchmarks.training import TrainingCase, check_is_longer, complaint, random_tokens
from rtpurbo.config import AttentionRule
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.settings import IndexerTrainingSettings
from rtpurbo.training.layerwise import train_layer_by_layer
from rtpurbo.training.sequences import TrainingSequence

# Tokens beyond a window in the warm-up step and in the correctness check.
WARM_UP_TOKENS = 4096


class Stage1Case(TrainingCase):
    """Model whose indexers are trained; arguments as of `TrainingCase`."""

    phase = "stage1"
    documents = 1
    """Documents of equal length that are packed into a step."""

    def prepare(self, device: torch.device) -> list[Tensor]:
        """Returns the weights of all indexers."""
        self.timer = PartTimer(device)
        modules = [module for module in headwise_modules(self.model) if module.retrieval_heads]
        return [
            weight
            for module in modules
            for weight in module.indexer.float().requires_grad_(True).parameters()
        ]

    def sequences(self, length: int, documents: int) -> list[TrainingSequence]:
        """Random tokens in documents of equal length."""
        ids = random_tokens(self.model, length)
        return [TrainingSequence(part.tolist()) for part in ids.tensor_split(documents)]

    def learn(
        self, sequences: Sequence[TrainingSequence], backend: str, num_queries: int | None = None
    ) -> Tensor:
        """Accumulates gradients and returns the losses of the sequences."""
        total = sum(len(sequence.input_ids) for sequence in sequences)
        settings = IndexerTrainingSettings(queries_per_step=num_queries, lengths=(total,))
        seeds = [str(number) for number in range(len(sequences))]
        losses = train_layer_by_layer(
            self.model, sequences, settings, seeds,
            backend=backend, around_loss=self.timer.around_part,
        )  # fmt: skip
        return torch.stack(losses)

    def step(self, sequences: Sequence[TrainingSequence], backend: str) -> Tensor:
        """Training step, timed."""
        with self.timer.around_whole():
            losses = self.learn(sequences, backend)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return losses

    def ready_step(self, length: int, backend: str) -> Call:
        """Step on the documents, after one on a short sequence."""
        self.step(self.short_sequence(length), backend)
        return partial(self.step, self.sequences(length, self.documents), backend)

    def short_sequence(self, longest: int | None = None) -> list[TrainingSequence]:
        """Sequence that is little longer than a window."""
        length = self.rule.sliding_window + WARM_UP_TOKENS
        return self.sequences(length if longest is None else min(length, longest), 1)

    def check(self, backend: str, call: Call) -> str | None:
        """Compares loss and gradient of a short sequence with plain PyTorch."""
        short = self.short_sequence()
        found = self.loss_and_gradient(short, backend, 256)
        return complaint(found, self.loss_and_gradient(short, "eager", 256))

    def figures(self, session: Session, length: int, found: Measurement) -> dict[str, Any]:
        """Record fields computed from the measurement, with the time of the loss."""
        whole, loss = self.timer.milliseconds()
        session.log(f"  of which the loss: {loss:.4g} ms, {loss / whole:.1%}")
        return {
            **super().figures(session, length, found),
            "loss_milliseconds": round(loss, 3),
            "loss_share": round(loss / whole, 4),
        }


def bench_stage1(
    session: Session,
    geometry: str,
    rule: AttentionRule,
    lengths: Sequence[int],
    documents: int,
    dtype: torch.dtype,
    layers: int | None = None,
) -> None:
    """Measures steps of stage 1, in which 15 % of the heads learn from all queries.

    Both implementations share the frozen model's forward pass; `eager` computes the loss in chunks of queries.

    Args:
        session: measures the entries.
        geometry: name in `GEOMETRIES`.
        rule: windows, and the distribution that top-p applies to.
        lengths: tokens per step.
        documents: number of documents packed into a step.
        dtype: dtype of the model's weights.
        layers: number of layers; None for all.

    Raises:
        RTPurboError: documents are not longer than sinks and window.
    """
    shortest = min(lengths) // documents
    check_is_longer("documents", shortest, rule, "there is nothing to learn")
    session.log(f"{geometry}: initialising random weights")
    case = Stage1Case(geometry, rule, dtype, session.device, layers)
    kernels = "triton" if session.device.type == "cuda" else "auto"
    case.documents = documents
    note = "" if documents == 1 else f"{documents} documents"
    case.measure(session, lengths, kernels, note)

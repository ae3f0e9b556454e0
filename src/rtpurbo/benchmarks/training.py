"""Case, record fields and correctness check that the benchmarks of both training stages share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.benchmarks.geometries import build_model, draw_indexers, model_facts, spread_head_map
from rtpurbo.benchmarks.session import Entry, Session, release
from rtpurbo.benchmarks.timing import Call, Measurement
from rtpurbo.config import AttentionRule, RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.sparsify import sparsify
from rtpurbo.training.optimizer import make_optimizer

IMPLEMENTATIONS = ("rtpurbo", "eager")
RATIO = 0.15
# Largest relative errors of loss and gradient against plain PyTorch; half precision rounds both.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 0.01, 0.05


class TrainingCase:
    """Sparse model with random weights, of which some are trained.

    A subclass sets `phase`, and the trained weights in `prepare`.

    Args:
        geometry: name in `GEOMETRIES`.
        rule: windows and selection.
        dtype: dtype of the model's weights.
        device: device to measure on.
        layers: number of layers; None for all.
    """

    phase: ClassVar[str]
    rule_changes: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        geometry: str,
        rule: AttentionRule,
        dtype: torch.dtype,
        device: torch.device,
        layers: int | None,
    ) -> None:
        self.geometry, self.rule = geometry, replace(rule, **self.rule_changes)
        self.model = build_model(geometry, layers, dtype, device)
        self.head_map = spread_head_map(self.model.config, RATIO)
        sparsify(self.model, RTPurboConfig(self.head_map, self.rule))
        draw_indexers(self.model)
        self.weights = list(self.prepare(device))
        self.optimizer, _ = make_optimizer(self.weights, 1e-4, 0.0, 0, 1)

    def prepare(self, device: torch.device) -> Iterable[Tensor]:
        """Returns the trained weights, in fp32."""
        raise NotImplementedError

    def ready_step(self, length: int, backend: str) -> Call:
        """Returns the step of a length with a backend, after the work that only a first step does."""
        raise NotImplementedError

    def check(self, backend: str, call: Call) -> str | None:
        """Compares loss and gradient of a short sequence with plain PyTorch; returns an error or None."""
        raise NotImplementedError

    def figures(self, session: Session, length: int, found: Measurement) -> dict[str, Any]:
        """Record fields computed from the measurement."""
        peak = found.peak_memory_bytes
        return {
            "tokens_per_second": round(1000 * length / found.milliseconds, 1),
            "peak_memory_gib": None if peak is None else round(peak / 2**30, 2),
        }

    def measure(
        self, session: Session, lengths: Sequence[int], backend: str, note: str = ""
    ) -> None:
        """Measures the step of every length with rtpurbo's backend, checked, and in plain PyTorch."""
        case = self.phase, self.geometry, self.model, self.head_map, self.rule
        for length in sorted(lengths):
            for name, used in zip(IMPLEMENTATIONS, (backend, "eager"), strict=True):
                if session.wants(name):
                    is_ours = name == "rtpurbo"
                    entry = Entry(
                        name,
                        {"": partial(self.ready_step, length, used)},
                        model_facts(*case, length),
                        partial(self.check, used) if is_ours else None,
                        is_ours=is_ours,
                        note=note,
                        figures=partial(self.figures, session, length),
                    )
                    session.run(entry)
                    release(session.device)

    def learn(self, *arguments: Any) -> Tensor:
        """Accumulates gradients and returns the loss, or one for each sequence."""
        raise NotImplementedError

    def loss_and_gradient(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Result of `learn`, and the gradients of all trained weights in one vector, which are cleared."""
        loss = self.learn(*arguments)
        gradients = [weight.grad.flatten() for weight in self.weights if weight.grad is not None]
        self.optimizer.zero_grad(set_to_none=True)
        return loss, torch.cat(gradients)


def check_is_longer(what: str, shortest: int, rule: AttentionRule, consequence: str) -> None:
    """Refuses sequences that are not longer than sinks and window.

    Raises:
        RTPurboError: they are not.
    """
    reach = rule.sliding_window + rule.num_sink_tokens
    if shortest <= reach:
        raise RTPurboError(
            f"{what} of {shortest:,} tokens are not longer than sinks and window "
            f"({reach:,} tokens), so {consequence}; use longer ones."
        )


def random_tokens(model: PreTrainedModel, length: int) -> Tensor:
    """Token ids int64 [length], the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (length,), generator=generator)


def complaint(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> str | None:
    """Difference of (losses, gradient) from plain PyTorch, or None if it is small enough."""
    (losses, gradient), (expected_losses, expected_gradient) = found, expected
    if not bool(losses.isfinite().all() and gradient.isfinite().all()):
        return "the loss or the gradient is not finite"
    loss_error = float(((losses - expected_losses).abs() / expected_losses.abs()).max())
    gradient_error = float((gradient - expected_gradient).norm() / expected_gradient.norm())
    if loss_error > LOSS_TOLERANCE:
        return f"the relative error of the loss is {loss_error:.2%}"
    if gradient_error > GRADIENT_TOLERANCE:
        return f"the relative error of the gradient is {gradient_error:.2%}"
    return None

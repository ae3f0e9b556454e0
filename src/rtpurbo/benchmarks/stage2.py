"""Training step of stage 2 on a model with random weights: self-distillation into a LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor

from rtpurbo.benchmarks.session import Session
from rtpurbo.benchmarks.timing import Call
from rtpurbo.benchmarks.training import (
    TrainingCase,
    check_is_longer,
    complaint,
    figures,
    random_tokens,
)
from rtpurbo.config import AttentionRule
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import runtime
from rtpurbo.settings import DistillationSettings
from rtpurbo.training.sequences import TrainingSequence
from rtpurbo.training.sharding import clip_gradients, gradient_norm
from rtpurbo.training.stage2 import MAX_GRADIENT_NORM, autocast, backpropagate
from rtpurbo.training.student import trainable, trained_weights
from rtpurbo.training.teacher import TeacherTargets, teacher_targets

SETTINGS = DistillationSettings()
# Largest number of queries that select: those of an answer.
ANSWER_TOKENS = SETTINGS.decode_queries
# Tokens beyond a window, and layers, of the correctness check. Few layers, because rounding errors of half
# precision accumulate over layers, while a wrong kernel is wrong in each of them.
CHECKED_TOKENS = 4096
CHECKED_LAYERS = 4
# Standard deviation for the LoRA matrices B, instead of zero: both matrices get gradients, and the student differs
# from its teacher by much more than rounding errors, which would dominate the gradients otherwise.
LORA_INIT_STD = 0.05


class Stage2Case(TrainingCase):
    """Sparse model with a trained LoRA; arguments as of `TrainingCase`, prefill of retrieval heads is dense."""

    phase = "stage2"
    rule_changes: ClassVar = {"prefill_mode": "dense"}

    def prepare(self, device: torch.device) -> Iterable[Tensor]:
        """Returns the weights of the LoRA."""
        self.opened = ExitStack()
        self.student = self.opened.enter_context(trainable(self.model, SETTINGS, 0))
        weights = trained_weights(self.student)
        generator = torch.Generator(device).manual_seed(0)
        for name, weight in weights.items():
            if "lora_B" in name:
                weight.data.normal_(0.0, LORA_INIT_STD, generator=generator)
        return weights.values()

    def sequence(self, length: int) -> tuple[TrainingSequence, TeacherTargets]:
        """Random tokens that end with an answer, and the dense model's targets for it."""
        ids = random_tokens(self.model, length)
        sequence = TrainingSequence(ids.tolist(), min(ANSWER_TOKENS, length // 2))
        assert isinstance(self.student, PeftModel)
        with self.student.disable_adapter(), runtime(self.model).dense(), autocast(self.model):
            return sequence, teacher_targets(self.model, sequence, SETTINGS, "position_labels")

    def learn(self, sequence: TrainingSequence, targets: TeacherTargets, backend: str) -> Tensor:
        """Accumulates gradients and returns the loss."""
        for module in headwise_modules(self.model):
            module.backend = backend
        return backpropagate(self.model, 0, sequence, targets, SETTINGS).loss

    def step(self, sequence: TrainingSequence, targets: TeacherTargets, backend: str) -> Tensor:
        """Training step."""
        loss = self.learn(sequence, targets, backend)
        clip_gradients(self.weights, MAX_GRADIENT_NORM, gradient_norm(self.weights))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def bench_stage2(
    session: Session,
    geometry: str,
    rule: AttentionRule,
    lengths: Sequence[int],
    dtype: torch.dtype,
    layers: int | None = None,
) -> None:
    """Measures steps of stage 2, in which a LoRA of rank 16 learns and 15 % of the heads retrieve.

    The teacher's targets are computed before, as in training. Both implementations recompute layers in the
    backward pass and differ in the attention backend only.

    Args:
        session: measures the entries.
        geometry: name in `GEOMETRIES`.
        rule: windows and selection.
        lengths: tokens per step.
        dtype: dtype of the model's weights.
        layers: number of layers; None for all.

    Raises:
        RTPurboError: sequences are not longer than sinks and window.
    """
    check_is_longer("sequences", min(lengths), rule, "nothing would be sparse")
    session.log(f"{geometry}: initialising random weights")
    case = Stage2Case(geometry, rule, dtype, session.device, layers)
    fewer = CHECKED_LAYERS if layers is None else min(layers, CHECKED_LAYERS)
    compiled = "flex" if session.device.type == "cuda" else "auto"

    @cache
    def fault() -> str | None:
        # One check serves all lengths.
        return _fault(geometry, rule, dtype, session.device, fewer, compiled)

    with case.opened:
        case.measure(
            session,
            lengths,
            compiled,
            partial(_prepare, case),
            lambda call: fault(),
            figures,
            f"LoRA of rank {SETTINGS.lora_rank}",
        )


def _prepare(case: Stage2Case, length: int, backend: str) -> Call:
    sequence, targets = case.sequence(length)
    if backend != "eager":
        # Compiles for this length, outside of the timing.
        case.step(sequence, targets, backend)
    return partial(case.step, sequence, targets, backend)


def _fault(
    geometry: str,
    rule: AttentionRule,
    dtype: torch.dtype,
    device: torch.device,
    layers: int,
    backend: str,
) -> str | None:
    """Error of loss and gradient of a few layers on a short sequence against plain PyTorch, or None."""
    case = Stage2Case(geometry, rule, dtype, device, layers)
    with case.opened:
        sequence, targets = case.sequence(rule.sliding_window + CHECKED_TOKENS)
        found = case.loss_and_gradient(sequence, targets, backend)
        return complaint(found, case.loss_and_gradient(sequence, targets, "eager"))

"""Training step of stage 2 on a model with random weights: self-distillation into a LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import ClassVar

import torch
from peft import PeftModel
from torch import Tensor

from rtpurbo.benchmarks.session import Session
from rtpurbo.benchmarks.timing import Call
from rtpurbo.benchmarks.training import TrainingCase, check_is_longer, complaint, random_tokens
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
        self.compiled = "flex" if device.type == "cuda" else "auto"
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

    def ready_step(self, length: int, backend: str) -> Call:
        """Step on a sequence of a length, compiled for it."""
        sequence, targets = self.sequence(length)
        if backend != "eager":
            self.step(sequence, targets, backend)
        return partial(self.step, sequence, targets, backend)

    def check(self, backend: str, call: Call) -> str | None:
        """Compares with plain PyTorch, once for all lengths."""
        return self._fault

    @cached_property
    def _fault(self) -> str | None:
        """Error of loss and gradient of a few layers on a short sequence against plain PyTorch, or None."""
        layers, model = min(self.model.config.num_hidden_layers, CHECKED_LAYERS), self.model
        case = Stage2Case(self.geometry, self.rule, model.dtype, model.device, layers)
        with case.opened:
            sequence, targets = case.sequence(self.rule.sliding_window + CHECKED_TOKENS)
            found = case.loss_and_gradient(sequence, targets, self.compiled)
            return complaint(found, case.loss_and_gradient(sequence, targets, "eager"))


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
    with case.opened:
        case.measure(session, lengths, case.compiled, f"LoRA of rank {SETTINGS.lora_rank}")

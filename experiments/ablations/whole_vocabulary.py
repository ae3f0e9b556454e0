"""Stage 2 by the divergence over the whole vocabulary, instead of the teacher's likeliest tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rtpurbo.models.sparsify import runtime
from rtpurbo.settings import DistillationSettings
from rtpurbo.training import stage2
from rtpurbo.training.failure import SequenceResult
from rtpurbo.training.sequences import TrainingSequence
from rtpurbo.training.targets import states_at
from rtpurbo.training.teacher import TeacherTargets

LABELS_AT_ONCE = 512


@contextmanager
def whole_vocabulary() -> Iterator[None]:
    """Inside, `stage2.distill` learns from all of the teacher's logits; with a LoRA alone."""
    before = stage2.backpropagate
    stage2.backpropagate = backpropagate
    try:
        yield
    finally:
        stage2.backpropagate = before


def backpropagate(
    model: PreTrainedModel,
    number: int,
    sequence: TrainingSequence,
    targets: TeacherTargets,
    settings: DistillationSettings,
) -> SequenceResult:
    """As `stage2.backpropagate`, with a teacher that runs beside: all its logits would not fit a disk."""
    positions = targets.positions
    with torch.no_grad(), runtime(model).dense(), without_adapter(model), stage2.autocast(model):
        teacher = states_at(model, sequence.input_ids, positions)
    with runtime(model).decoding_last(stage2.num_selecting_queries(sequence, settings)):
        with stage2.autocast(model):
            student = states_at(model, sequence.input_ids, positions)
            divergence = vocabulary_divergence(
                teacher, student, model.get_output_embeddings().weight
            )
        loss, figures = stage2.loss_of(divergence, targets.answers, settings)
        loss.backward()
    return SequenceResult(number, sequence.input_ids, divergence.detach().mean(), figures)


def vocabulary_divergence(teacher: Tensor, student: Tensor, weight: Tensor) -> Tensor:
    """Forward KL of each label between teacher and student, in nats: [labels].

    Args:
        teacher: last hidden states [labels, hidden_size].
        student: likewise; gradients flow to it.
        weight: of the output embedding, [vocabulary, hidden_size].
    """
    parts = [
        checkpoint(_divergence, *states, weight, use_reentrant=False)
        for states in zip(teacher.split(LABELS_AT_ONCE), student.split(LABELS_AT_ONCE), strict=True)
    ]
    return torch.cat(parts)


def _divergence(teacher: Tensor, student: Tensor, weight: Tensor) -> Tensor:
    expected, found = (
        F.linear(states, weight).float().log_softmax(-1) for states in (teacher, student)
    )
    return F.kl_div(found, expected, reduction="none", log_target=True).sum(-1)


@contextmanager
def without_adapter(model: PreTrainedModel) -> Iterator[None]:
    """The base weights alone, inside."""
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for module in adapted:
        module.enable_adapters(False)
    try:
        yield
    finally:
        for module in adapted:
            module.enable_adapters(True)

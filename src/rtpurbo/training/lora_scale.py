"""Choice of the scale of stage 2's LoRA on held-out sequences of every kind.

Interpolated weights often generalise better than those before or after fine-tuning (WiSE-FT,
arXiv 2109.01903). Stage 2 can also increase the divergence: on sequences within the window the sparse model
equals the dense one before stage 2, and any LoRA changes that. A scale is accepted only if no kind of sequence
gets worse; at 0 stage 2 is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.settings import DistillationSettings, Progress
from rtpurbo.training.sequences import TrainingMix, TrainingSequence
from rtpurbo.training.teacher import TeacherTargets, teacher_targets

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)

SEQUENCES_PER_KIND = 4

TOLERANCE = 0.01
"""Nats by which a kind's mean loss may exceed its loss without stage 2."""

HeldOut = dict[str, list[tuple[TrainingSequence, TeacherTargets]]]
"""Sequences that are not trained on, by kind, with the dense model's predictions."""

Losses = dict[float, dict[str, float]]
"""Mean loss by scale and kind of sequence, in nats."""


def draw_held_out(
    teacher: PreTrainedModel, mix: TrainingMix, settings: DistillationSettings
) -> HeldOut:
    """Draws as many held-out sequences of each kind, and runs the dense model over them."""
    held_out: HeldOut = {}
    for kind in mix.kinds():
        held_out[kind] = []
        for number in range(SEQUENCES_PER_KIND):
            sequence = mix.of_kind(kind, number)
            seed = f"labels-{mix.purpose}-{kind}-{number}"
            targets = teacher_targets(teacher, sequence, settings, seed)
            held_out[kind].append((sequence, targets))
    return held_out


@torch.no_grad()
def losses_by_scale(
    student: PeftModel,
    held_out: HeldOut,
    loss: Callable[[TrainingSequence, TeacherTargets], Tensor],
    progress: Progress,
) -> Losses:
    """Returns the mean loss of each kind of held-out sequences at each scale of the LoRA."""
    losses: Losses = {}
    for number, scale in enumerate(SCALES):
        with rescale_adapter_scale(student, scale):
            losses[scale] = {
                kind: fmean(loss(*each).item() for each in sequences)
                for kind, sequences in held_out.items()
            }
        mean = fmean(losses[scale].values())
        progress("LoRA scale", number + 1, len(SCALES), {"loss": mean})
    return losses


def choose_scale(losses: Mapping[float, Mapping[str, float]]) -> float:
    """Returns the scale with the least mean loss over kinds among those that harm no kind."""
    without = losses[0.0]
    harmless = [
        scale
        for scale, by_kind in losses.items()
        if all(loss <= without[kind] + TOLERANCE for kind, loss in by_kind.items())
    ]
    return min(harmless, key=lambda scale: fmean(losses[scale].values()))

"""How much of what stage 2 learnt is kept: so much that held-out sequences come nearest to the teacher's.

Weights between those of before and after a training often do better beyond its kind of data than either
(WiSE-FT, arXiv 2109.01903). Stage 2 starts so near its teacher that it can leave it on sequences of other
lengths and kinds (docs/experiment-log.md); how far its way leads to is measured, not assumed.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.settings import DistillationSettings, Progress
from rtpurbo.training.sequences import TrainingMix, TrainingSequence
from rtpurbo.training.teacher import TeacherTargets, teacher_targets

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""What is tried."""

HELD_OUT_SEQUENCES = 16
"""At least; as many of each length."""


HeldOut = list[tuple[TrainingSequence, TeacherTargets]]
"""Sequences that are not trained on, and what the teacher says about them."""


def draw_held_out(
    teacher: PreTrainedModel, mix: TrainingMix, settings: DistillationSettings
) -> HeldOut:
    """Draws sequences and runs the teacher.

    Args:
        teacher: dense.
        mix: of held-out text, otherwise like that of the training.
        settings: which tokens are labels.
    """
    rounds = -(-HELD_OUT_SEQUENCES // len(mix.lengths))
    found = []
    for number in range(rounds * len(mix.lengths)):
        sequence, seed = mix.sequence(number), f"labels-{mix.purpose}-{number}"
        found.append((sequence, teacher_targets(teacher, sequence, settings, seed)))
    return found


@torch.no_grad()
def losses_by_share(
    student: PeftModel,
    held_out: HeldOut,
    loss: Callable[[TrainingSequence, TeacherTargets], Tensor],
    progress: Progress,
) -> dict[float, float]:
    """The mean loss on held-out sequences with each share of a LoRA.

    Args:
        student: with the LoRA.
        held_out: what it is asked.
        loss: of a sequence.
        progress: told after each share.
    """
    found = {}
    for number, share in enumerate(SHARES):
        with rescale_adapter_scale(student, share):
            found[share] = fmean(loss(*each).item() for each in held_out)
        progress("share", number + 1, len(SHARES), {"loss": found[share]})
    return found

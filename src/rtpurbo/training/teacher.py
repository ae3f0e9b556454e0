"""The dense teacher's most likely next tokens, computed once and kept on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.settings import DistillationSettings
from rtpurbo.training.sequences import TrainingSequence
from rtpurbo.training.shards import Shards
from rtpurbo.training.source import SequenceSource
from rtpurbo.training.targets import choose_targets, states_at
from rtpurbo.training.vocabulary import most_likely


@dataclass
class TeacherTargets:
    """What the teacher says about some tokens of one sequence.

    Attributes:
        positions: int64 [labels]: the logits at these positions predict the label tokens.
        answers: bool [labels], whether the label token belongs to an answer.
        token_ids: int64 [labels, top_logits], the most likely next tokens.
        log_probabilities: fp32 [labels, top_logits], under the teacher's full softmax.
    """

    positions: Tensor
    answers: Tensor
    token_ids: Tensor
    log_probabilities: Tensor

    def to(self, device: torch.device) -> TeacherTargets:
        """The same on a device."""
        return TeacherTargets(*(tensor.to(device) for tensor in vars(self).values()))


def teacher_targets(
    teacher: PreTrainedModel, sequence: TrainingSequence, settings: DistillationSettings, seed: str
) -> TeacherTargets:
    """Runs the dense teacher over a sequence.

    Args:
        teacher: dense.
        sequence: what it reads.
        settings: which tokens are labels, and how many of its logits are kept for each.
        seed: of the choice of labels.
    """
    positions, answers = choose_targets(sequence, settings, seed)
    return targets_at(teacher, sequence.input_ids, positions, answers, settings.top_logits)


@torch.no_grad()
def targets_at(
    teacher: PreTrainedModel,
    input_ids: list[int],
    positions: Tensor,
    answers: Tensor,
    top_logits: int,
) -> TeacherTargets:
    """Runs the dense teacher over a sequence and returns its most likely next tokens at some positions.

    Args:
        teacher: dense.
        input_ids: what it reads.
        positions: int64 [labels].
        answers: bool [labels], whether each predicts an answer token.
        top_logits: tokens kept for each.
    """
    states = states_at(teacher, input_ids, positions)
    token_ids, values = most_likely(states, teacher.get_output_embeddings(), top_logits)
    return TeacherTargets(positions, answers, token_ids, values)


class TeacherCache:
    """Sequences with their targets, in shards: a stream is read once, and training needs no other copy.

    Every process writes those of its own sequences, and reads them back; another number of processes
    finds them too.

    Args:
        folder: where the shards live.
        source: the sequences.
        settings: as for `teacher_targets`.
        seed: of the labels.

    Raises:
        RTPurboError: a shard there cannot be read.
    """

    def __init__(
        self, folder: Path, source: SequenceSource, settings: DistillationSettings, seed: int
    ) -> None:
        self.source = source
        self.settings = settings
        self.seed = seed
        self._shards = Shards(folder)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, `fill` is called; at the end all is on disk, even if something interrupts."""
        with self._shards.writing():
            yield

    def fill(self, teacher: PreTrainedModel, step: int) -> None:
        """Computes the targets of this process's sequences of one step, unless they are there.

        Args:
            teacher: dense.
            step: steps are filled in order.

        Raises:
            RTPurboError: texts cannot be read, or the disk is full.
        """
        numbers = self.source.numbers(step)
        missing = torch.tensor([number not in self._shards for number in numbers])
        needed = missing
        if self.source.processes.shard_weights:
            # The processes run every layer together, also for what this one has already.
            needed = self.source.processes.gather(missing.int().to(teacher.device)).cpu().any(0)
        if not needed.any():
            return
        if step and not self.source.follows(step):
            self.source.seek(self._position_before(step))
        sequences = self.source.take(step)
        position = self.source.position(step + 1)
        for place, (number, sequence) in enumerate(zip(numbers, sequences, strict=True)):
            if not needed[place]:
                continue
            seed = f"labels-{self.seed}-{number}"
            targets = teacher_targets(teacher, sequence, self.settings, seed)
            if not missing[place]:
                continue
            self._shards.add(
                number,
                {
                    "input_ids": torch.tensor(sequence.input_ids, dtype=torch.int32),
                    "num_answer_tokens": torch.tensor(sequence.num_answer_tokens),
                    **vars(targets),
                    "token_ids": targets.token_ids.to(torch.int32),
                },
                # Where the next sequence of this lane stands, for a run that is resumed here.
                None if position is None else position["lanes"][self._lane(number)],
            )

    def _lane(self, number: int) -> str:
        return str(number % self.source.per_step)

    def _position_before(self, step: int) -> dict[str, Any] | None:
        """Where the sequences of a step stand, as was noted with those of the step before."""
        numbers = self.source.numbers(step - 1)
        lanes = {self._lane(number): self._shards.note(number) for number in numbers}
        if None in lanes.values():
            return None
        return {"group": step, "lanes": lanes}

    def read(self, number: int) -> tuple[TrainingSequence, TeacherTargets]:
        """One sequence and its targets.

        Raises:
            RTPurboError: its shard cannot be read.
        """
        tensors = self._shards.read(number)
        return (
            TrainingSequence(tensors["input_ids"].tolist(), int(tensors["num_answer_tokens"])),
            TeacherTargets(
                tensors["positions"],
                tensors["answers"],
                tensors["token_ids"].long(),
                tensors["log_probabilities"],
            ),
        )


def top_logits_divergence(student: Tensor, targets: TeacherTargets) -> Tensor:
    """Forward KL of each label between teacher and student over the teacher's top tokens and "any other token".

    The paper matches the top-10 logits; the eleventh outcome keeps the student from moving mass to tokens outside them
    (our reading, docs/experiment-log.md).

    Args:
        student: [labels, top_logits], the student's log-probabilities of the targets' tokens.
        targets: the teacher's, on the same device.

    Returns:
        [labels], in nats.
    """
    teacher = targets.log_probabilities
    inside = (teacher.exp() * (teacher - student)).sum(-1)
    tiny = torch.finfo(teacher.dtype).tiny
    teacher_rest = (1 - teacher.exp().sum(-1)).clamp(min=tiny)
    student_rest = (1 - student.exp().sum(-1)).clamp(min=1e-7)
    return inside + teacher_rest * (teacher_rest.log() - student_rest.log())

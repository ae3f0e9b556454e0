"""The dense teacher's most likely next tokens, computed once and kept on disk."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.files import save_tensors_atomically
from rtpurbo.training.sequences import TrainingSequence
from rtpurbo.training.source import SequenceSource


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


def label_positions(
    sequence: TrainingSequence, num_labels: int, seed: str
) -> tuple[Tensor, Tensor]:
    """Which positions are learnt from: all that predict answer tokens, and a random choice of the others.

    Returns:
        Positions, int64 ascending, and whether each predicts an answer token.
    """
    last = len(sequence.input_ids) - 1
    first_answer = last - sequence.num_answer_tokens
    others = list(range(first_answer))
    wanted = max(0, min(len(others), num_labels - sequence.num_answer_tokens))
    chosen = sorted(random.Random(seed).sample(others, wanted))
    positions = torch.tensor([*chosen, *range(first_answer, last)])
    return positions, positions >= first_answer


def label_logits(model: PreTrainedModel, input_ids: list[int], positions: Tensor) -> Tensor:
    """Logits at some positions of a sequence, fp32 [labels, vocabulary]; no others are ever computed."""
    ids = torch.tensor([input_ids], device=model.device)
    hidden = model.base_model(ids, use_cache=False).last_hidden_state[0, positions.to(model.device)]
    return model.get_output_embeddings()(hidden).float()


class TeacherCache:
    """Sequences with their targets, one file each: a stream is read once, and training needs no other copy.

    Every process writes the files of its own sequences, and reads them back.

    Args:
        folder: where the files live.
        source: the sequences.
        seed: of the labels.
        num_labels: label tokens of a sequence.
        top_logits: teacher logits kept a label (paper: 10).
    """

    def __init__(
        self, folder: Path, source: SequenceSource, seed: int, num_labels: int, top_logits: int
    ) -> None:
        self.folder = folder
        self.source = source
        self.seed = seed
        self.num_labels = num_labels
        self.top_logits = top_logits

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.safetensors"

    @torch.no_grad()
    def fill(self, teacher: PreTrainedModel, step: int) -> None:
        """Computes the targets of this process's sequences of one step, unless they are there.

        Args:
            teacher: dense.
            step: steps are filled in order.

        Raises:
            RTPurboError: texts cannot be read, or the disk is full.
        """
        numbers = self.source.numbers(step)
        if all(self._path(number).is_file() for number in numbers):
            return
        if step and not self.source.follows(step):
            self.source.seek(self._position_before(step))
        sequences = self.source.take(step)
        position = json.dumps(self.source.position(step + 1))
        for number, sequence in zip(numbers, sequences, strict=True):
            positions, answers = label_positions(
                sequence, self.num_labels, f"labels-{self.seed}-{number}"
            )
            logits = label_logits(teacher, sequence.input_ids, positions)
            top = logits.log_softmax(-1).topk(self.top_logits)
            save_tensors_atomically(
                self._path(number),
                {
                    "input_ids": torch.tensor(sequence.input_ids, dtype=torch.int32),
                    "num_answer_tokens": torch.tensor(sequence.num_answer_tokens),
                    "positions": positions,
                    "answers": answers,
                    "token_ids": top.indices.to(torch.int32).cpu(),
                    "log_probabilities": top.values.cpu(),
                },
                # Where the next sequences stand, for a run that is resumed here.
                {"position": position},
            )

    def _position_before(self, step: int) -> dict[str, Any] | None:
        """Where the sequences of a step stand, as the files of the step before say."""
        lanes: dict[str, Any] = {}
        for number in self.source.numbers(step - 1):
            with safe_open(self._path(number), "pt") as file:
                position = json.loads(file.metadata()["position"])
            if position is None:
                return None
            lanes |= position["lanes"]
        return {"group": step, "lanes": lanes}

    def read(self, number: int) -> tuple[TrainingSequence, TeacherTargets]:
        """One sequence and its targets."""
        tensors = load_file(self._path(number))
        return (
            TrainingSequence(tensors["input_ids"].tolist(), int(tensors["num_answer_tokens"])),
            TeacherTargets(
                tensors["positions"],
                tensors["answers"],
                tensors["token_ids"].long(),
                tensors["log_probabilities"],
            ),
        )


def top_logits_divergence(student_logits: Tensor, targets: TeacherTargets) -> Tensor:
    """Forward KL of each label between teacher and student over the teacher's top tokens and "any other token".

    The paper matches the top-10 logits; the eleventh outcome keeps the student from moving mass to tokens outside them
    (our reading, docs/experiment-log.md).

    Args:
        student_logits: [labels, vocabulary].
        targets: the teacher's, on the same device.

    Returns:
        [labels], in nats.
    """
    teacher = targets.log_probabilities
    student = student_logits.log_softmax(-1).gather(-1, targets.token_ids)
    inside = (teacher.exp() * (teacher - student)).sum(-1)
    tiny = torch.finfo(teacher.dtype).tiny
    teacher_rest = (1 - teacher.exp().sum(-1)).clamp(min=tiny)
    student_rest = (1 - student.exp().sum(-1)).clamp(min=1e-7)
    return inside + teacher_rest * (teacher_rest.log() - student_rest.log())

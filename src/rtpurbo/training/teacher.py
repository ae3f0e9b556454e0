"""Target positions of stage 2, and the dense teacher's top logits there, computed once and cached on disk."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.errors import RTPurboError
from rtpurbo.files import save_tensors_atomically
from rtpurbo.models.decoder import decoder_of
from rtpurbo.settings import DistillationSettings
from rtpurbo.training.sequences import TrainingSequence
from rtpurbo.training.source import SequenceSource
from rtpurbo.training.vocabulary import most_likely


@dataclass
class TeacherTargets:
    """Teacher's top predictions at the target positions of one sequence.

    Attributes:
        positions: int64 [targets]; the logits at these positions predict the target tokens.
        answers: bool [targets], true where the target token belongs to an answer.
        token_ids: int64 [targets, top_logits], the most likely next tokens.
        log_probabilities: fp32 [targets, top_logits], under the teacher's full softmax.
    """

    positions: Tensor
    answers: Tensor
    token_ids: Tensor
    log_probabilities: Tensor

    def to(self, device: torch.device) -> TeacherTargets:
        """Returns a copy on a device."""
        return TeacherTargets(*(tensor.to(device) for tensor in vars(self).values()))


def choose_targets(
    sequence: TrainingSequence, settings: DistillationSettings, seed: str
) -> tuple[Tensor, Tensor]:
    """Chooses target positions in the answer, in the text before it, or in both.

    Returns:
        int64 [targets], ascending positions whose logits predict the target tokens, and bool [targets],
        true where the target token belongs to an answer.
    """
    last = len(sequence.input_ids) - 1
    first_answer = last - sequence.num_answer_tokens
    answers = list(range(first_answer, last))
    if settings.targets == "answers" and answers:
        text: list[int] = []
    else:
        text = list(range(last if settings.targets == "text" else first_answer))
        if settings.targets == "text":
            answers = []
        wanted = max(0, min(len(text), settings.targets_per_sequence - len(answers)))
        text = sorted(random.Random(seed).sample(text, wanted))
    positions = torch.tensor([*text, *answers])
    return positions, positions >= first_answer


def states_at(
    model: PreTrainedModel, input_ids: list[int], positions: Tensor, first_position: int = 0
) -> Tensor:
    """Returns the model's last hidden states at some places of `input_ids`: [places, hidden_size].

    `first_position` is the position of the first token, whose prompt the model's layers have already.
    """
    ids = torch.tensor([input_ids], device=model.device)
    options = {}
    if first_position:
        options["position_ids"] = (
            torch.arange(ids.shape[1], device=ids.device)[None] + first_position
        )
    states = decoder_of(model)(ids, use_cache=False, **options).last_hidden_state
    return states[0].index_select(0, positions.to(model.device))


def teacher_targets(
    teacher: PreTrainedModel, sequence: TrainingSequence, settings: DistillationSettings, seed: str
) -> TeacherTargets:
    """Runs the dense teacher over a sequence and returns its predictions at target positions that a seed chooses."""
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
    """Runs the dense teacher over a sequence and returns its predictions at given positions, int64 [targets].

    Answers are bool [targets], true where an answer token is predicted.
    """
    states = states_at(teacher, input_ids, positions)
    token_ids, values = most_likely(states, teacher.get_output_embeddings(), top_logits)
    return TeacherTargets(positions, answers, token_ids, values)


@dataclass
class TeacherCache:
    """Cache of sequences with their targets on disk, one file for each: a stream is read only once.

    Each process writes and reads its own sequences; a resumed run with another number of processes reads
    the same files.
    """

    folder: Path
    source: SequenceSource
    settings: DistillationSettings
    seed: int

    def fill(self, teacher: PreTrainedModel, step: int) -> None:
        """Computes the targets of this process's sequences of one step, unless they are cached.

        Args:
            teacher: dense.
            step: step number; steps are filled in order.

        Raises:
            RTPurboError: texts or a file cannot be read, or the disk is full.
        """
        numbers = self.source.numbers(step)
        missing = torch.tensor([not self._path(number).is_file() for number in numbers])
        needed = missing
        if self.source.processes.shard_weights:
            # All processes run every layer together, so a process runs sequences that another one lacks.
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
            # Position of the lane's next sequence, for a run that resumes here.
            lane = None if position is None else position["lanes"][self._lane(number)]
            save_tensors_atomically(
                self._path(number),
                {
                    "input_ids": torch.tensor(sequence.input_ids, dtype=torch.int32),
                    "num_answer_tokens": torch.tensor(sequence.num_answer_tokens),
                    **vars(targets),
                    "token_ids": targets.token_ids.to(torch.int32),
                },
                {"position": json.dumps(lane)},
            )

    def read(self, number: int) -> tuple[TrainingSequence, TeacherTargets]:
        """Returns one sequence and its targets.

        Raises:
            RTPurboError: its file cannot be read.
        """
        with self._opened(number) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return (
                TrainingSequence(tensors["input_ids"].tolist(), int(tensors["num_answer_tokens"])),
                TeacherTargets(
                    tensors["positions"],
                    tensors["answers"],
                    tensors["token_ids"].long(),
                    tensors["log_probabilities"],
                ),
            )

    def _lane(self, number: int) -> str:
        return str(number % self.source.per_step)

    def _path(self, number: int) -> Path:
        return self.folder / f"sequence-{number:06d}.safetensors"

    def _position_before(self, step: int) -> dict[str, Any] | None:
        """Position in the stream before a step, recorded with the sequences of the previous step."""
        lanes = {}
        for number in self.source.numbers(step - 1):
            with self._opened(number) as file:
                lanes[self._lane(number)] = json.loads(file.metadata()["position"])
        return None if None in lanes.values() else {"group": step, "lanes": lanes}

    @contextmanager
    def _opened(self, number: int) -> Iterator[Any]:
        path = self._path(number)
        try:
            with safe_open(path, "pt") as file:
                yield file
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RTPurboError(
                f"{path} cannot be read: remove it, and run the command again with --resume."
            ) from error


def top_logits_divergence(student: Tensor, targets: TeacherTargets) -> Tensor:
    """Returns the forward KL between teacher and student over the teacher's top tokens and "any other token".

    The paper matches the top-10 logits; the additional outcome keeps the student from moving probability to other
    tokens (our interpretation, docs/experiment-log.md).

    Args:
        student: [targets, top_logits], the student's log-probabilities of the targets' tokens.
        targets: the teacher's predictions, on the same device.

    Returns:
        [targets], in nats.
    """
    teacher = targets.log_probabilities
    inside = (teacher.exp() * (teacher - student)).sum(-1)
    tiny = torch.finfo(teacher.dtype).tiny
    teacher_rest = (1 - teacher.exp().sum(-1)).clamp(min=tiny)
    student_rest = (1 - student.exp().sum(-1)).clamp(min=1e-7)
    return inside + teacher_rest * (teacher_rest.log() - student_rest.log())

"""Sequences that a model has written itself, kept in a file of a conversion's work folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rtpurbo.errors import RTPurboError
from rtpurbo.files import save_tensors_atomically
from rtpurbo.processes import ALONE, Processes
from rtpurbo.training.sequences import TrainingSequence

HELD_OUT = 16
"""Sequences of each pool that are not trained on, if it has twice as many."""


@dataclass(frozen=True)
class Pools:
    """Sequences written before training.

    Attributes:
        conversations: short ones; see `write_conversations`.
        documents: long ones; see `write_document_answers`.
    """

    conversations: tuple[TrainingSequence, ...] = ()
    documents: tuple[TrainingSequence, ...] = ()

    def split(self) -> tuple[Pools, Pools]:
        """The pools to train on, and held-out ones: the last `HELD_OUT` of each, or half of a small pool."""
        pools = (self.conversations, self.documents)
        cuts = [len(pool) - min(HELD_OUT, len(pool) // 2) for pool in pools]
        return (
            Pools(*(pool[:cut] for pool, cut in zip(pools, cuts, strict=True))),
            Pools(*(pool[cut:] for pool, cut in zip(pools, cuts, strict=True))),
        )


def kept_sequences(
    path: Path,
    write: Callable[[], Sequence[TrainingSequence]],
    processes: Processes = ALONE,
) -> tuple[TrainingSequence, ...]:
    """The sequences in a file; written now if it is not there.

    Args:
        path: the file, written whole or not at all.
        write: makes the sequences.
        processes: those that call this together; the main one writes the file.

    Raises:
        RTPurboError: the file cannot be read, or the disk is full.
    """
    if not processes.from_main(path.is_file):
        sequences = write()
        processes.from_main(lambda: save_sequences(path, sequences))
    return read_sequences(path)


def save_sequences(path: Path, sequences: Sequence[TrainingSequence]) -> None:
    """Writes sequences to a safetensors file, whole or not at all."""
    save_tensors_atomically(
        path,
        {
            "input_ids": torch.tensor(
                [token_id for sequence in sequences for token_id in sequence.input_ids],
                dtype=torch.int32,
            ),
            "lengths": torch.tensor([len(each.input_ids) for each in sequences]),
            "answers": torch.tensor([each.num_answer_tokens for each in sequences]),
        },
    )


def read_sequences(path: Path) -> tuple[TrainingSequence, ...]:
    """Reads what `save_sequences` wrote.

    Raises:
        RTPurboError: the file is missing or corrupt.
    """
    try:
        tensors = load_file(path)
        parts = tensors["input_ids"].split(tensors["lengths"].tolist())
        answers = tensors["answers"].tolist()
        return tuple(
            TrainingSequence(part.tolist(), answer)
            for part, answer in zip(parts, answers, strict=True)
        )
    except (OSError, SafetensorError, KeyError, RuntimeError, ValueError) as error:
        raise RTPurboError(
            f"{path} cannot be read: remove it, and run the command again with --resume."
        ) from error

"""Pools of training sequences that the dense model writes before training, kept in the work folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import Prose
from rtpurbo.errors import RTPurboError
from rtpurbo.files import save_tensors_atomically
from rtpurbo.processes import SINGLE_PROCESS, Processes
from rtpurbo.settings import DistillationSettings, IndexerTrainingSettings, Progress, no_progress
from rtpurbo.training.conversations import write_conversations
from rtpurbo.training.document_answers import write_document_answers
from rtpurbo.training.sequences import HELD_OUT, Pools, TrainingSequence

MAX_CONVERSATIONS, MAX_DOCUMENTS = 512, 128
"""Largest pools; a stage that needs more sequences repeats them."""

CONVERSATIONS_FILE, DOCUMENTS_FILE = "conversations.safetensors", "documents.safetensors"


def write_pools(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: Prose,
    stages: Sequence[IndexerTrainingSettings | DistillationSettings],
    folder: Path,
    *,
    seed: int = 0,
    progress: Progress = no_progress,
    processes: Processes = SINGLE_PROCESS,
) -> None:
    """Writes the pools that some stages train on, one file each, unless the folder has them already.

    Documents have the lengths of the last stage that trains on them. Processes that hold parts of the model call this
    together.

    Raises:
        RTPurboError: documents do not fit their lengths, the model writes no usable conversation, or
            the disk is full.
    """
    stages = [stage.resolved(processes.count) for stage in stages if stage.steps]

    def write_task(
        task: str, file: str, most: int, write: Callable[..., list[TrainingSequence]]
    ) -> None:
        training = [stage for stage in stages if task in stage.mixture]
        if training:
            count = min(most, max(_count(stage, task) for stage in training))
            lengths = training[-1].lengths
            cached_sequences(folder / file, lambda: write(lengths, count), processes)

    def documents(lengths: Sequence[int], count: int) -> list[TrainingSequence]:
        return write_document_answers(
            model, tokenizer, corpus, lengths, count, seed=seed, progress=progress
        )

    def conversations(_: Sequence[int], count: int) -> list[TrainingSequence]:
        batch_size = 128 if model.device.type == "cuda" else 16
        return write_conversations(
            model, tokenizer, count, seed=seed, batch_size=batch_size, progress=progress
        )

    write_task("documents", DOCUMENTS_FILE, MAX_DOCUMENTS, documents)
    write_task("conversations", CONVERSATIONS_FILE, MAX_CONVERSATIONS, conversations)


def read_pools(folder: Path) -> Pools:
    """Returns the pools that `write_pools` wrote; those that no stage trains on are empty.

    Raises:
        RTPurboError: a file cannot be read.
    """
    paths = (folder / CONVERSATIONS_FILE, folder / DOCUMENTS_FILE)
    return Pools(*(read_sequences(path) if path.is_file() else () for path in paths))


def _count(stage: IndexerTrainingSettings | DistillationSettings, task: str) -> int:
    """Returns how many sequences of a task a stage trains on and holds out."""
    groups = stage.steps
    if isinstance(stage, IndexerTrainingSettings):
        groups = math.ceil(groups / stage.steps_per_sequence)
    return math.ceil(stage.mixture[task] * groups * stage.per_step) + HELD_OUT


def cached_sequences(
    path: Path,
    write: Callable[[], Sequence[TrainingSequence]],
    processes: Processes = SINGLE_PROCESS,
) -> tuple[TrainingSequence, ...]:
    """Returns the sequences in a file, which is written first if it does not exist.

    Args:
        path: the file, written whole or not at all.
        write: generates the sequences.
        processes: processes that call this together; the main one writes the file.

    Raises:
        RTPurboError: the file cannot be read, or the disk is full.
    """
    if not processes.from_main(path.is_file):
        sequences = write()
        processes.from_main(lambda: save_sequences(path, sequences))
    return read_sequences(path)


def save_sequences(path: Path, sequences: Sequence[TrainingSequence]) -> None:
    """Writes sequences to a safetensors file, whole or not at all."""
    token_ids = [token_id for sequence in sequences for token_id in sequence.input_ids]
    save_tensors_atomically(
        path,
        {
            "input_ids": torch.tensor(token_ids, dtype=torch.int32),
            "lengths": torch.tensor([len(each.input_ids) for each in sequences]),
            "answers": torch.tensor([each.num_answer_tokens for each in sequences]),
        },
    )


def read_sequences(path: Path) -> tuple[TrainingSequence, ...]:
    """Returns the sequences that `save_sequences` wrote.

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

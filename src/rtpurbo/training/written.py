"""The pools of one conversion: as many sequences as its stages take, written once by the dense model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.data.texts import Prose
from rtpurbo.processes import ALONE, Processes
from rtpurbo.settings import (
    DistillationSettings,
    IndexerTrainingSettings,
    Progress,
    no_progress,
)
from rtpurbo.training.conversations import write_conversations
from rtpurbo.training.document_answers import write_document_answers
from rtpurbo.training.pools import HELD_OUT, Pools, kept_sequences, read_sequences

MAX_CONVERSATIONS, MAX_DOCUMENTS = 512, 128
"""The largest pools; a training that takes more sequences meets them again."""

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
    processes: Processes = ALONE,
) -> None:
    """Writes the sequences that the stages have a share of, unless the folder has them.

    Args:
        model: dense, before it is made sparse.
        tokenizer: the model's.
        corpus: prose of the documents.
        stages: those to be run; documents have the lengths of the last one with a share of them.
        folder: gets a file for each pool.
        seed: of everything.
        progress: called after each batch.
        processes: those that hold parts of the model and call this together.

    Raises:
        RTPurboError: documents do not fit their lengths, the model writes no usable conversation, or
            the disk is full.
    """
    reading = [stage for stage in stages if stage.mixture.get("documents") and stage.steps]
    if reading:
        documents = max(_count(stage, "documents") for stage in reading)
        kept_sequences(
            folder / DOCUMENTS_FILE,
            lambda: write_document_answers(
                model,
                tokenizer,
                corpus,
                reading[-1].lengths,
                min(documents, MAX_DOCUMENTS),
                seed=seed,
                progress=progress,
            ),
            processes,
        )
    talking = [stage for stage in stages if stage.mixture.get("conversations") and stage.steps]
    if talking:
        conversations = max(_count(stage, "conversations") for stage in talking)
        kept_sequences(
            folder / CONVERSATIONS_FILE,
            lambda: write_conversations(
                model,
                tokenizer,
                min(conversations, MAX_CONVERSATIONS),
                seed=seed,
                batch_size=128 if model.device.type == "cuda" else 16,
                progress=progress,
            ),
            processes,
        )


def read_pools(folder: Path) -> Pools:
    """The pools that `write_pools` left in a folder; those without a share are empty.

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
    return math.ceil(stage.mixture[task] * groups * (stage.sequences_per_step or 1)) + HELD_OUT

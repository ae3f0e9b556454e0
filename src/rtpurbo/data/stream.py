"""Streamed texts with resumable positions.

`datasets` streams files and the Hub's datasets and saves its position. Its shuffle buffer is lost on
resumption, so documents are shuffled here: a buffer is filled, emptied in random order and filled again, and
a position consists of the stream position at which the buffer was filled and the number of documents taken.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtpurbo.data.sources import check_is_file, import_datasets, parse_hub_source
from rtpurbo.data.texts import TextCorpus, encode
from rtpurbo.errors import RTPurboError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_READERS = {
    (".txt", ".md"): ("text", {"sample_by": "document"}),
    (".jsonl", ".jsonl.gz"): ("json", {}),
    (".parquet",): ("parquet", {}),
}


@dataclass(frozen=True)
class TextStream:
    """Streamed texts, with two parts at the beginning that are kept in memory.

    Attributes:
        name: name in error messages.
        held_out: first documents, excluded from training.
        opening: documents after them, which represent the stream where random access is needed; training
            reads them again.
        documents: all but the held-out ones, as a streaming dataset with a column `text`.
        buffer_size: documents shuffled at a time.
        seed: seed of the shuffle.
    """

    name: str
    held_out: TextCorpus
    opening: TextCorpus
    documents: Any
    buffer_size: int
    seed: int

    def lane(self, number: int, count: int) -> StreamLane:
        """Returns one of `count` disjoint parts of the stream, which are read independently.

        Each part gets whole files if their number allows it, else every `count`-th document.
        """
        from datasets.distributed import split_dataset_by_node

        part = split_dataset_by_node(self.documents, rank=number, world_size=count)
        return StreamLane(self.name, part, self.buffer_size, f"{self.seed}-{number}")


class StreamLane:
    """Part of a stream, repeated when it ends; prose is sampled from it as from a `TextCorpus`.

    Args:
        name: name of the stream in error messages.
        documents: streaming dataset.
        buffer_size: documents shuffled at a time.
        seed: seed of the shuffle.
    """

    def __init__(self, name: str, documents: Any, buffer_size: int, seed: str) -> None:
        self.name = name
        self._dataset = documents
        self._start_of_data = deepcopy(documents.state_dict())
        self._buffer_size = buffer_size
        self._seed = seed
        self._rows: Iterator[dict[str, Any]] = iter(())
        self._ended = True
        self._buffer: list[str] = []
        # Position at which the buffer was filled, and the number of documents taken from it.
        self._epoch, self._buffers, self._taken = -1, 0, 0
        self._start_of_buffer: Any = None

    def position(self) -> dict[str, Any]:
        """Returns the position of the next document in plain types, for `seek`."""
        return {
            "epoch": self._epoch,
            "buffers": self._buffers,
            "taken": self._taken,
            "start_of_buffer": deepcopy(self._start_of_buffer),
        }

    def seek(self, position: dict[str, Any]) -> None:
        """Moves to a position of a lane of the same stream."""
        self._epoch, self._buffers = position["epoch"], position["buffers"]
        self._buffer, self._taken = [], 0
        self._start_of_buffer = deepcopy(position["start_of_buffer"])
        self._ended = True
        if self._start_of_buffer is not None:
            self._dataset.load_state_dict(deepcopy(self._start_of_buffer))
            self._rows, self._ended = iter(self._dataset), False
            self._fill()
            self._taken = position["taken"]

    def next_document(self) -> str:
        """Returns the next text that is not empty.

        Raises:
            RTPurboError: there is no text, or it cannot be read.
        """
        tries = 0
        while self._taken >= len(self._buffer):
            if self._ended:
                tries += 1
                if tries > 2:
                    raise RTPurboError(
                        f"the stream {self.name} has too few documents to train on: give more "
                        "text, or read it without --stream."
                    )
                self._epoch, self._buffers = self._epoch + 1, 0
                # Until a row is read, the dataset reports its previous position.
                self._start_of_buffer = deepcopy(self._start_of_data)
                self._dataset.load_state_dict(deepcopy(self._start_of_data))
                self._rows, self._ended = iter(self._dataset), False
            else:
                self._buffers += 1
                self._start_of_buffer = deepcopy(self._dataset.state_dict())
            self._fill()
            self._taken = 0
        self._taken += 1
        return self._buffer[self._taken - 1]

    def sample_tokens(
        self, tokenizer: PreTrainedTokenizerBase, num_tokens: int, rng: random.Random
    ) -> list[int]:
        """Returns exactly `num_tokens` tokens of prose from the next documents, joined if one is too short.

        Unlike `TextCorpus.sample_tokens`, it uses each document once per pass through the stream.

        Raises:
            RTPurboError: the whole stream is shorter.
        """
        joined = self.next_document()
        epoch = self._epoch
        example = joined[:4096]
        # Estimated from the first document, so that joined texts are tokenized rarely.
        needed = 1.2 * num_tokens * len(example) / max(1, len(encode(tokenizer, example)))
        while True:
            while len(joined) < needed and self._epoch <= epoch + 1:
                joined += "\n\n" + self.next_document()
            try:
                return TextCorpus(self.name, (joined,)).sample_tokens(tokenizer, num_tokens, rng)
            except RTPurboError:
                if self._epoch > epoch + 1:
                    raise
            needed = 1.2 * len(joined) + 1

    def _fill(self) -> None:
        self._buffer = []
        try:
            while len(self._buffer) < self._buffer_size:
                row = next(self._rows, None)
                if row is None:
                    self._ended = True
                    break
                if row["text"] and row["text"].strip():
                    self._buffer.append(row["text"])
        except Exception as error:  # files and networks fail in many ways
            raise _cannot_read(self.name, error) from error
        random.Random(f"shuffle-{self._seed}-{self._epoch}-{self._buffers}").shuffle(self._buffer)


def open_stream(
    sources: Sequence[str] | None, *, buffer_size: int = 256, held_out: int = 64, seed: int = 0
) -> TextStream:
    """Opens a stream that reads several sources in turn.

    Args:
        sources: files (`.txt` and `.md`, each one document; `.jsonl`, `.jsonl.gz` and `.parquet`
            with a field `text`) and datasets of the Hub (`hf:NAME[:CONFIGURATION][:SPLIT]`).
        buffer_size: documents shuffled at a time.
        held_out: documents at the beginning that are excluded from training; the same number after them
            is kept in memory.
        seed: seed of the shuffle.

    Raises:
        RTPurboError: a source is missing, unreadable or of an unknown kind, has no field `text`, or
            there are too few documents.
    """
    if not sources:
        raise RTPurboError("a stream needs texts to read: name files or datasets with --data.")
    if isinstance(sources, str):
        sources = [sources]
    datasets = import_datasets(f"the stream {sources[0]}")
    parts = [_open_source(datasets, source) for source in sources]
    name = ", ".join(sources)
    documents = parts[0]
    if len(parts) > 1:
        documents = datasets.interleave_datasets(
            parts, stopping_strategy="all_exhausted_without_replacement"
        )
    try:
        first = [row["text"] for row in documents.take(2 * held_out)]
    except Exception as error:  # files and networks fail in many ways
        raise _cannot_read(name, error) from error
    first = [text if text and text.strip() else "" for text in first]
    kept, opening = (tuple(filter(None, part)) for part in (first[:held_out], first[held_out:]))
    if not kept or not opening:
        raise RTPurboError(
            f"the stream {name} has no more than the {held_out} documents that are held out "
            "(stream.held_out): give more text, or read it without --stream."
        )
    return TextStream(
        name,
        # Error messages show the name, and with it the setting to change if a part is too short.
        TextCorpus(f"{name} (stream.held_out={held_out}, held-out part)", kept),
        TextCorpus(f"{name} (stream.held_out={held_out}, part kept in memory)", opening),
        documents.skip(held_out),
        buffer_size,
        seed,
    )


def _open_source(datasets: Any, source: str) -> Any:
    if source.startswith("hf:"):
        name, configuration, split = parse_hub_source(source)
        arguments: tuple[str, str | None] = (name, configuration)
        options: dict[str, Any] = {"split": split}
    else:
        path = Path(source).expanduser()
        check_is_file(path, source)
        for endings, (reader, extra) in _READERS.items():
            if path.name.endswith(endings):
                arguments, options = (reader, None), {"data_files": [str(path)], **extra}
                break
        else:
            raise RTPurboError(
                f"the text file {source} is of an unknown kind; "
                "use .txt, .md, .jsonl, .jsonl.gz or .parquet."
            )
        options["split"] = "train"
    try:
        dataset = datasets.load_dataset(*arguments, streaming=True, **options)
        columns = dataset.column_names or list(next(iter(dataset), {}))
    except Exception as error:  # files and networks fail in many ways
        raise _cannot_read(source, error) from error
    if "text" not in columns:
        raise RTPurboError(
            f'{source} has no field "text", only {", ".join(columns) or "nothing"}; '
            "rename the field that holds the text."
        )
    return dataset.select_columns(["text"])


def _cannot_read(source: str, error: Exception) -> RTPurboError:
    return RTPurboError(
        f"cannot read the texts {source}: {first_line(error)}; check them and the network."
    )

"""Numbered groups of tensors in safetensors files of bounded size, each written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rtpurbo.errors import RTPurboError
from rtpurbo.files import save_tensors_atomically

# Upper bound of what a killed process has to recompute.
MAX_BYTES = 16 * 2**20


class Shards:
    """Groups of tensors by number, each with a note, in the files of a folder.

    Several processes may write different groups to one folder. Groups are buffered in memory until they fill
    a file, and can be read from the buffer.

    Args:
        folder: folder of the files; existing files are read.
        max_bytes: maximum size of the tensors in a file of several groups.

    Raises:
        RTPurboError: an existing file cannot be read.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._files: dict[int, Path] = {}
        self._notes: dict[int, Any] = {}
        self._buffered: dict[int, dict[str, Tensor]] = {}
        for path in sorted(folder.glob("shard-*.safetensors")):
            with _reading(path), safe_open(path, "pt") as file:
                notes = json.loads(file.metadata()["notes"])
            for number, note in notes.items():
                self._files[int(number)], self._notes[int(number)] = path, note

    def __contains__(self, number: int) -> bool:
        return number in self._notes

    def note(self, number: int) -> Any:
        """Returns the note of a group."""
        return self._notes[number]

    def add(self, number: int, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Adds a group.

        Args:
            number: number of the group, which must be new.
            tensors: tensors by name.
            note: value of plain JSON types.

        Raises:
            RTPurboError: the disk is full.
        """
        assert number not in self, "a group is written once"
        tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        if self._buffered and self._size(tensors) + sum(
            map(self._size, self._buffered.values())
        ) > (self.max_bytes):
            self.flush()
        self._buffered[number], self._notes[number] = tensors, note

    def flush(self) -> None:
        """Writes the buffered groups.

        Raises:
            RTPurboError: the disk is full.
        """
        if not self._buffered:
            return
        # Each number is written once, so the file name is unique.
        path = self.folder / f"shard-{min(self._buffered):06d}.safetensors"
        save_tensors_atomically(
            path,
            {
                _name(number, name): tensor
                for number, group in self._buffered.items()
                for name, tensor in group.items()
            },
            {"notes": json.dumps({number: self._notes[number] for number in self._buffered})},
        )
        self._files |= dict.fromkeys(self._buffered, path)
        self._buffered = {}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Context in which groups are added; on exit all are on disk, also after an interruption."""
        try:
            yield
        finally:
            self.flush()

    def read(self, number: int) -> dict[str, Tensor]:
        """Returns the tensors of a group by name.

        Raises:
            RTPurboError: its file cannot be read.
        """
        if number in self._buffered:
            return dict(self._buffered[number])
        path, prefix = self._files[number], _name(number, "")
        with _reading(path), safe_open(path, "pt") as file:
            return {
                name.removeprefix(prefix): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118 (not a dictionary)
                if name.startswith(prefix)
            }

    @staticmethod
    def _size(tensors: Mapping[str, Tensor]) -> int:
        return sum(tensor.nbytes for tensor in tensors.values())


def _name(number: int, name: str) -> str:
    return f"{number:06d}.{name}"


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RTPurboError(
            f"{path} cannot be read: remove it, and run the command again with --resume."
        ) from error

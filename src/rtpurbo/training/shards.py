"""Numbered groups of tensors on disk, many in a file: each file of bounded size, and whole or not there."""

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

# What a process that is killed has to compute again at the most.
MAX_BYTES = 16 * 2**20


class Shards:
    """Groups of tensors by number, each with a note, in safetensors files of a folder.

    Several processes may write to a folder, each groups that no other one writes. Groups gather in
    memory until they fill a file, and may be read from there.

    Args:
        folder: where the files live; what lies there is found again.
        max_bytes: of the tensors of a file, if it holds more than one group.

    Raises:
        RTPurboError: a file there cannot be read.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._files: dict[int, Path] = {}
        self._notes: dict[int, Any] = {}
        self._waiting: dict[int, dict[str, Tensor]] = {}
        for path in sorted(folder.glob("shard-*.safetensors")):
            with _reading(path), safe_open(path, "pt") as file:
                notes = json.loads(file.metadata()["notes"])
            for number, note in notes.items():
                self._files[int(number)], self._notes[int(number)] = path, note

    def __contains__(self, number: int) -> bool:
        return number in self._notes

    def note(self, number: int) -> Any:
        """What was noted with a group."""
        return self._notes[number]

    def add(self, number: int, tensors: Mapping[str, Tensor], note: Any = None) -> None:
        """Adds a group.

        Args:
            number: its number, which must be new.
            tensors: by name.
            note: plain JSON types.

        Raises:
            RTPurboError: the disk is full.
        """
        assert number not in self, "a group is written once"
        tensors = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
        if self._waiting and self._size(tensors) + sum(map(self._size, self._waiting.values())) > (
            self.max_bytes
        ):
            self.flush()
        self._waiting[number], self._notes[number] = tensors, note

    def flush(self) -> None:
        """Writes what waits in memory.

        Raises:
            RTPurboError: the disk is full.
        """
        if not self._waiting:
            return
        # Numbers are written once, so no other file begins with this one.
        path = self.folder / f"shard-{min(self._waiting):06d}.safetensors"
        save_tensors_atomically(
            path,
            {
                _name(number, name): tensor
                for number, group in self._waiting.items()
                for name, tensor in group.items()
            },
            {"notes": json.dumps({number: self._notes[number] for number in self._waiting})},
        )
        self._files |= dict.fromkeys(self._waiting, path)
        self._waiting = {}

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, groups are added; at the end all are on disk, even if something interrupts."""
        try:
            yield
        finally:
            self.flush()

    def read(self, number: int) -> dict[str, Tensor]:
        """The tensors of a group by name.

        Raises:
            RTPurboError: its file cannot be read.
        """
        if number in self._waiting:
            return dict(self._waiting[number])
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

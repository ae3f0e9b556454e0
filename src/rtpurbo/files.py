"""Files and folders that are written whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rtpurbo.errors import RTPurboError


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path to write to beside `path`, and renames what was written on success.

    Missing parent folders are made. On failure the temporary file is removed and whatever stood
    at `path` stays as it was.

    Raises:
        RTPurboError: the parent folder cannot be written to.
    """
    path = Path(path)
    temporary = _temporary_sibling(path)
    try:
        new = temporary / path.name
        yield new
        new.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` to `path` as UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json_atomically(path: str | os.PathLike[str], obj: Any) -> None:
    """Writes `obj` to `path` as indented JSON, whole or not at all."""
    write_text_atomically(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def save_tensors_atomically(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes named tensors to `path` in the safetensors format, whole or not at all.

    Args:
        path: the file to write.
        tensors: tensors of any shape, type and device.
        metadata: strings to store in the file's header.
    """
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        save_file(contiguous, temporary, metadata=dict(metadata or {}))
        # safetensors lets nobody else read what it writes; an artifact is made to be shared.
        temporary.chmod(0o644)


def check_output_folder(destination: str | os.PathLike[str], overwrite: bool) -> None:
    """Checks, before a long job, that its result can be put into `destination`.

    Raises:
        RTPurboError: `destination` is taken and `overwrite` is false, cannot be replaced, or
            cannot be made.
    """
    destination = Path(destination)
    if destination.exists() or destination.is_symlink():
        if not destination.is_dir() or destination.is_symlink():
            raise RTPurboError(f"{destination} is not a folder; choose another output folder.")
        if Path.cwd().resolve().is_relative_to(destination.resolve()):
            raise RTPurboError(
                f"{destination} contains the current folder and cannot be replaced; "
                "choose another output folder."
            )
        if any(destination.iterdir()) and not overwrite:
            raise RTPurboError(
                f"{destination} exists already; choose another folder or pass --force "
                "to replace it."
            )
    shutil.rmtree(_temporary_sibling(destination))


@contextmanager
def whole_folder(destination: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary sibling folder and renames it to `destination` on success.

    On failure the temporary folder is removed and whatever stood at `destination` stays as it
    was. An empty `destination` counts as free.

    Args:
        destination: the folder to make; missing parents are made too.
        overwrite: replace `destination` if it exists.

    Raises:
        RTPurboError: as `check_output_folder` does.
    """
    destination = Path(destination)
    check_output_folder(destination, overwrite)
    temporary = _temporary_sibling(destination)
    try:
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        yield new
        # The job may have been long: somebody else may have taken the place meanwhile.
        check_output_folder(destination, overwrite)
        if destination.exists():
            destination.rename(old)
        try:
            new.rename(destination)
        except OSError:
            if old.exists():
                old.rename(destination)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_sibling(path: Path) -> Path:
    """Makes an empty folder beside `path`, so that a rename between them is atomic."""
    parent = path.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))
    except OSError as error:
        raise RTPurboError(
            f"Cannot write to the folder {parent} ({error.strerror}); "
            "choose another place or change its permissions."
        ) from error

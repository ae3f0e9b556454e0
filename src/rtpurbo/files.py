"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtpurbo.errors import RTPurboError
from rtpurbo.interruption import signals_held

if TYPE_CHECKING:
    import torch

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors and torch report what the system said in words of their own.
_FULL_IN_WORDS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter failed writing",
    "inline_container",
    "iostream error",
)


@contextmanager
def explaining_a_full_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what a full disk makes of a write into one sentence.

    Args:
        path: what is being written.

    Raises:
        RTPurboError: there was no space for it.
    """
    try:
        yield
    except Exception as error:  # safetensors and torch raise classes of their own
        full = isinstance(error, OSError) and error.errno in _FULL
        if not (full or any(words in str(error) for words in _FULL_IN_WORDS)):
            raise
        raise RTPurboError(
            f"there is no space left on the disk to write {path}: free some and run the command "
            "again (a conversion continues with --resume)."
        ) from error


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path to write to beside `path`, and renames what was written on success.

    Missing parent folders are made. On failure the temporary file is removed and whatever stood
    at `path` stays as it was.

    Raises:
        RTPurboError: the parent folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    temporary = _temporary_sibling(path)
    try:
        with explaining_a_full_disk(path):
            new = temporary / path.name
            yield new
            # Else a machine that loses power may keep the new name with nothing behind it.
            with new.open("rb") as written:
                os.fsync(written.fileno())
            new.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Writes `text` to `path` as UTF-8, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def append_text(path: Path, text: str, keep: int) -> int:
    """Appends `text` to `path` as UTF-8 and flushes it to the disk.

    Args:
        path: the file; it and missing parent folders are made.
        text: to append.
        keep: bytes of the file to keep. What follows them is of a write that was interrupted.

    Returns:
        The bytes of the file.

    Raises:
        RTPurboError: the file cannot be written to, or the disk is full.
    """
    try:
        with explaining_a_full_disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as file:
                file.truncate(keep)
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
                return file.tell()
    except OSError as error:
        raise RTPurboError(
            f"cannot write to {path} ({error.strerror}): choose another place or change its "
            "permissions."
        ) from error


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
    from safetensors.torch import save_file  # imports torch, which takes seconds

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        # With empty metadata and no tensors it writes a header that it cannot read.
        save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)
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
        RTPurboError: as `check_output_folder` does, or the disk is full.
    """
    destination = Path(destination)
    check_output_folder(destination, overwrite)
    temporary = _temporary_sibling(destination)
    try:
        new, old = temporary / "new", temporary / "old"
        with explaining_a_full_disk(destination):
            new.mkdir()
            yield new
        # The job may have been long: somebody else may have taken the place meanwhile.
        check_output_folder(destination, overwrite)
        with signals_held():
            if destination.exists():
                destination.rename(old)
            try:
                new.rename(destination)
            except OSError:
                if old.exists():
                    old.rename(destination)
                raise
    finally:
        if destination.exists() or not (temporary / "old").exists():
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


def cache_folder() -> Path:
    """The folder for downloaded models; the environment variable RTPURBO_CACHE overrides it."""
    return Path(os.environ.get("RTPURBO_CACHE") or "~/.cache/rtpurbo").expanduser()


def check_stays_inside(folder: Path, path: Path) -> None:
    """Refuses a file that is a link out of its folder; those of the Hub's cache are allowed.

    Raises:
        RTPurboError: it is one.
    """
    target, inside = path.resolve(), folder.resolve()
    blobs = inside.parent.parent / "blobs"
    if not target.is_relative_to(inside) and target.parent != blobs:
        raise RTPurboError(
            f"{path} is a link to a file outside of the folder; put the file itself in its place, or "
            "remove it."
        )

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
# Messages of safetensors and torch, which do not raise OSError.
_FULL_MESSAGES = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter failed writing",
    "inline_container",
    "iostream error",
)


@contextmanager
def explaining_a_full_disk(path: str | os.PathLike[str]) -> Iterator[None]:
    """Context in which errors of a full disk become an `RTPurboError`.

    Args:
        path: path that is written.

    Raises:
        RTPurboError: the disk is full.
    """
    try:
        yield
    except Exception as error:  # safetensors and torch raise other classes
        full = isinstance(error, OSError) and error.errno in _FULL
        if not (full or any(words in str(error) for words in _FULL_MESSAGES)):
            raise
        raise RTPurboError(
            f"there is no space left on the disk to write {path}: free some and run the command "
            "again (a conversion continues with --resume)."
        ) from error


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the same folder, which is renamed to `path` on success.

    Missing parent folders are created. On failure the temporary file is removed, and an existing file is
    unchanged.

    Raises:
        RTPurboError: the parent folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    temporary = _temporary_sibling(path)
    try:
        with explaining_a_full_disk(path):
            new = temporary / path.name
            yield new
            # Otherwise the file could be empty after a power failure.
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
        path: file; it and missing parent folders are created.
        text: text to append.
        keep: bytes of the file to keep; the rest belongs to an interrupted write.

    Returns:
        The size of the file in bytes.

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
        path: file to write.
        tensors: tensors of any shape, dtype and device.
        metadata: strings in the file's header.
    """
    from safetensors.torch import save_file  # imports torch, which takes seconds

    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        # With empty metadata and no tensors, safetensors writes a header that it cannot read.
        save_file(contiguous, temporary, metadata=dict(metadata) if metadata else None)
        # safetensors creates files that only their owner can read; artifacts are shared.
        temporary.chmod(0o644)


def check_output_folder(destination: str | os.PathLike[str], overwrite: bool) -> None:
    """Checks before a long job that a folder can be written.

    Raises:
        RTPurboError: `destination` exists and `overwrite` is false, cannot be replaced, or cannot be
            created.
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
    """Yields a temporary sibling folder, which is renamed to `destination` on success.

    On failure the temporary folder is removed, and an existing folder is unchanged. An empty folder can
    always be replaced.

    Args:
        destination: folder; missing parents are created.
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
        # Another program may have created the folder in the meantime.
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
    """Creates an empty folder on the same file system as `path`, so that renaming is atomic."""
    parent = path.absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))
    except OSError as error:
        raise RTPurboError(
            f"cannot write to the folder {parent} ({error.strerror}); "
            "choose another place or change its permissions."
        ) from error


def cache_folder() -> Path:
    """Returns the folder for downloaded models; the environment variable RTPURBO_CACHE overrides it."""
    return Path(os.environ.get("RTPURBO_CACHE") or "~/.cache/rtpurbo").expanduser()


def check_stays_inside(folder: Path, path: Path) -> None:
    """Refuses a file that is a link out of its folder; links of the Hub's cache are allowed.

    Raises:
        RTPurboError: the file is such a link.
    """
    target, inside = path.resolve(), folder.resolve()
    blobs = inside.parent.parent / "blobs"
    if not target.is_relative_to(inside) and target.parent != blobs:
        raise RTPurboError(
            f"{path} is a link to a file outside of the folder; put the file itself in its place, or "
            "remove it."
        )

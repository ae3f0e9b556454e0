"""The folder of an artifact: a local one, or a download from the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact_config import (
    CONFIG_FILE,
    ArtifactConfig,
    dense_model_message,
    is_checkpoint,
    is_dense_model,
)


def find_artifact(
    path_or_name: str | os.PathLike[str], *, revision: str | None = None, **hub: Any
) -> Path:
    """Returns the folder of an artifact or an export, downloaded if it is on the Hub.

    Args:
        path_or_name: a folder, or a name on the Hub.
        revision: a branch, tag or commit on the Hub.
        hub: further arguments of `snapshot_download`, such as `token`.

    Raises:
        RTPurboError: neither exists, the Hub refuses access or cannot be reached, or it is a dense
            model.
    """
    folder = Path(path_or_name)
    if folder.is_dir():
        return folder
    name = str(path_or_name)
    # A dense model is found out before its weights are downloaded.
    folder = _download(name, revision, allow_patterns=["*.json", "*.md"], **hub)
    if is_dense_model(folder):
        raise RTPurboError(dense_model_message(name))
    return _download(name, revision, **hub)


def _download(name: str, revision: str | None, **options: Any) -> Path:
    import huggingface_hub

    from rtpurbo.models.hub import refusal_message, unreachable_message

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, **options))
    except Exception as error:  # no network shows itself in many ways
        # Where nothing is in the cache, the Hub's answer is the cause of the error.
        answers = (error, error.__cause__)
        refusals = (refusal_message(one, "artifact", name, revision) for one in answers)
        raise RTPurboError(next(filter(None, refusals), unreachable_message(name))) from error


def check_is_dense(name: str) -> None:
    """Refuses the folder of an artifact or an export where a dense model is expected.

    Raises:
        RTPurboError: the folder holds one.
    """
    folder = Path(name).expanduser()
    if not (folder / CONFIG_FILE).is_file() and not is_checkpoint(folder):
        return
    base = ArtifactConfig.read(folder).base.name
    raise RTPurboError(
        f"{name} is an artifact of rtpurbo, not a dense model: convert the dense model that it was "
        f"made from ({base}), or run stage 2 on it with `rtpurbo distill {name}`."
    )

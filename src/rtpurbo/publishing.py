"""Puts an artifact on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact import ArtifactConfig


def push_artifact(folder: str | Path, name: str, *, private: bool = False) -> str:
    """Uploads an artifact to a model repository, which is made where it is missing.

    Args:
        folder: the artifact's.
        name: of the repository, such as "somebody/smollm2-rtpurbo".
        private: whether a new repository is private.

    Returns:
        Where to see it.

    Raises:
        RTPurboError: `folder` holds no artifact, or the Hub refuses or cannot be reached.
    """
    ArtifactConfig.read(Path(folder))
    api = HfApi()
    try:
        url = str(api.create_repo(name, private=private, exist_ok=True))
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload with rtpurbo")
    except Exception as error:  # the network fails in many ways
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise RTPurboError(
            f"cannot push to '{name}' ({first_line}); check the name and the network, and log in "
            "with `hf auth login`."
        ) from error
    return url

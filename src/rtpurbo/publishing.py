"""Upload of artifacts to the Hugging Face Hub."""

from __future__ import annotations

import json
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from rtpurbo.errors import RTPurboError, first_line
from rtpurbo.files import check_stays_inside
from rtpurbo.models.artifact_config import ArtifactConfig, BaseReference

PUBLISHED_FILES = (
    "rtpurbo_config.json",
    "indexer*.safetensors",
    "stage2_weights.safetensors",
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "config.json",
    "generation_config.json",
    "headwise_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "README.md",
    "training_log.jsonl",
    "LICENSE*",
    "NOTICE*",
)
"""Files of an artifact or an export; other files in its folder are not uploaded."""

_TEXTS = (".json", ".jsonl", ".md")


def push_artifact(folder: str | Path, name: str, *, private: bool = False) -> str:
    """Uploads an artifact to a model repository, which is created if it does not exist.

    Only `PUBLISHED_FILES` are uploaded, and the path of a local base model is shortened to the name of
    its folder.

    Args:
        folder: folder of the artifact.
        name: name of the repository, such as "somebody/smollm2-rtpurbo".
        private: make a new repository private.

    Returns:
        The URL of the repository.

    Raises:
        RTPurboError: `folder` is not an artifact, a file is a link out of it, or the Hub refuses the upload or
            cannot be reached.
    """
    folder = Path(folder)
    base = ArtifactConfig.read(folder).base
    operations = [_addition(folder, path, base) for path in published_files(folder)]
    api = HfApi()
    try:
        url = str(api.create_repo(name, private=private, exist_ok=True))
        api.create_commit(name, operations, commit_message="Upload with rtpurbo")
    except Exception as error:  # the network fails in many ways
        raise RTPurboError(
            f"cannot push to '{name}' ({first_line(error)}); check the name and the network, and log in "
            "with `hf auth login`."
        ) from error
    return url


def published_files(folder: Path) -> list[Path]:
    """Returns the files of an artifact or an export, sorted by name.

    Raises:
        RTPurboError: a file is a link out of the folder.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # In a pattern, * would match a slash too.
        patterns = [pattern for pattern in PUBLISHED_FILES if pattern.count("/") == name.count("/")]
        if path.is_file() and any(fnmatch(name, pattern) for pattern in patterns):
            check_stays_inside(folder, path)
            found.append(path)
    return found


def _addition(folder: Path, path: Path, base: BaseReference) -> CommitOperationAdd:
    content: str | bytes = str(path)
    public = base.without_path().name
    if public != base.name and path.suffix in _TEXTS:
        text = path.read_bytes()
        for place, short in ((base.name, public), (json.dumps(base.name), json.dumps(public))):
            text = text.replace(place.encode(), short.encode())
        content = text
    return CommitOperationAdd(path.relative_to(folder).as_posix(), content)

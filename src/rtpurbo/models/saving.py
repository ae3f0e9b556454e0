"""Saving of a sparse model by `save_pretrained`: weights, configuration and indexers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

from rtpurbo.files import explaining_a_full_disk, write_json_atomically
from rtpurbo.models.artifact_config import (
    MODEL_CONFIG_FILE,
    ArtifactConfig,
    BaseReference,
    save_artifact,
)
from rtpurbo.models.model_config import MODEL_TYPE
from rtpurbo.models.pretrained import fingerprint
from rtpurbo.models.sparse_layers import indexer_weights

# Arguments of `save_pretrained` that are for the upload alone.
_UPLOAD = ("repo_id", "commit_message", "private", "token", "revision", "create_pr", "tags")


def save_sparse(
    model: PreTrainedModel,
    save_weights: Callable[..., None],
    save_directory: str | Path,
    *,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    **options: Any,
) -> None:
    """Writes a sparse model into a folder that `rtpurbo.load` reads as an export; other files in it stay.

    `save_weights` is the dense class's `save_pretrained`, bound to the model; other arguments are as of
    `save_pretrained`. A process that is not the main one writes nothing, but takes part in gathering the weights.
    """
    upload = {name: options.pop(name) for name in _UPLOAD if name in options}
    if getattr(model, "_hf_peft_config_loaded", False) or not is_main_process:
        # Only the adapter is saved, or nothing.
        save_weights(save_directory, is_main_process=is_main_process, **options)
        return
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    with (
        explaining_a_full_disk(folder),
        tempfile.TemporaryDirectory(prefix=".saving.", dir=folder) as temporary,
    ):
        new = Path(temporary)
        save_weights(new, **options)
        save_artifact(new, described(model), indexer_weights(model))
        write_model_config(new, model.config)
        for stale in folder.glob("model*.safetensors*"):
            if not (new / stale.name).exists():
                stale.unlink()
        # The configuration last: without it nothing takes the folder for a model.
        for file in sorted(new.iterdir(), key=lambda file: file.name == MODEL_CONFIG_FILE):
            file.chmod(0o644)
            file.replace(folder / file.name)
    if push_to_hub:
        model.push_to_hub(upload.pop("repo_id", folder.name), **upload)


def described(model: PreTrainedModel) -> ArtifactConfig:
    """The configuration of a sparse model as it stands, whose weights include any stage 2."""
    artifact: ArtifactConfig | None = vars(model).get("_rtpurbo_artifact")
    if artifact is None:
        name = Path(model.config.name_or_path or type(model).__name__).name
        reference = BaseReference(name, "local", None, fingerprint(model), type(model).__name__)
        return ArtifactConfig(reference, model.rtpurbo_config, "merged")
    return replace(
        artifact,
        base=artifact.base.without_path(),
        config=model.rtpurbo_config,
        stage2="merged",
    )


def write_model_config(folder: Path, config: PretrainedConfig) -> None:
    """Writes the config.json by which Auto classes know a sparse model, with that of the dense one in it."""
    # All of it, so that a later transformers with other defaults reads the same.
    dense = json.loads(config.to_json_string(use_diff=False))
    # The path of one machine, where the model was local.
    dense.pop("_name_or_path", None)
    write_json_atomically(
        folder / MODEL_CONFIG_FILE,
        {
            "model_type": MODEL_TYPE,
            "architectures": dense.get("architectures"),
            "base_config": dense,
        },
    )

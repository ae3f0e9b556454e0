"""Configuration of a sparse model for transformers, registered with `AutoConfig`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from rtpurbo.errors import RTPurboError

MODEL_TYPE = "rtpurbo (pip install rtpurbo; import transformers, then rtpurbo)"
"""`model_type` in config.json; the error of transformers for an unknown type shows nothing else."""

_ADDED_TO_PARTS = ("_name_or_path", "output_attentions")


class RTPurboModelConfig(PretrainedConfig):
    """The config.json of a sparse model, which holds the configuration of the dense one."""

    model_type = MODEL_TYPE

    def __init__(self, base_config: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.base_config = base_config or {}
        super().__init__(**kwargs)

    def dense(self) -> PretrainedConfig:
        """Returns the configuration of the dense model.

        Raises:
            RTPurboError: it is broken, or of a model type that transformers does not know.
        """
        # Configurations within it, such as those of DBRX, may refuse what transformers adds to all of them.
        settings = {
            name: {key: one for key, one in value.items() if key not in _ADDED_TO_PARTS}
            if isinstance(value, dict)
            else value
            for name, value in self.base_config.items()
        }
        try:
            return AutoConfig.for_model(settings.pop("model_type"), **settings)
        except Exception as error:  # a damaged file can raise anything
            raise RTPurboError(
                f"the configuration of the dense model in config.json cannot be read ({error})."
            ) from error


AutoConfig.register(MODEL_TYPE, RTPurboModelConfig, exist_ok=True)

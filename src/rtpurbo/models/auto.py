"""transformers' Auto classes for sparse models.

The module is imported, and so registers the classes, with the first public name of rtpurbo that is
used, or with rtpurbo itself if transformers is imported already. It imports no more than these two
need.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM

from rtpurbo.errors import RTPurboError
from rtpurbo.models.model_config import RTPurboModelConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Arguments that `AutoModelForCausalLM` adds to those of its caller.
_OF_AUTO_CLASSES = ("config", "trust_remote_code", "_from_auto", "_commit_hash")
# Where and how to look on the Hugging Face Hub; for the artifact and for its base model.
_HUB = ("token", "cache_dir", "local_files_only", "force_download")


class AutoRTPurboModelForCausalLM:
    """Loads sparse models the way `AutoModelForCausalLM` loads dense ones."""

    config_class = RTPurboModelConfig

    def __init__(self) -> None:
        raise OSError(
            f"{type(self).__name__} is made with {type(self).__name__}.from_pretrained(NAME)."
        )

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        base_model: str | None = None,
        dtype: torch.dtype | str = "auto",
        device_map: Any = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Loads an artifact, an export or a saved sparse model.

        The tokenizer comes from `AutoTokenizer.from_pretrained` with the same name.

        Args:
            pretrained_model_name_or_path: the folder, or the name on the Hugging Face Hub.
            base_model: where to take an artifact's base model from, if not from where it says.
            dtype: of the weights, as a torch type or its name; "auto" is the one they are stored in.
            device_map: as for transformers; nothing may be offloaded.
            revision: branch, tag or commit of the artifact; its base model has a revision of its own.
            token: for the Hub, like `cache_dir`.
            cache_dir: where downloads are kept.
            quantization_config: as for transformers; for an export or a saved model, not for an
                artifact whose stage 2 has yet to be merged.
            kwargs: further arguments of `AutoModelForCausalLM.from_pretrained`.

        Returns:
            The model in eval mode, frozen.

        Raises:
            RTPurboError: it is a dense model, or the artifact or its base model cannot be loaded.
        """
        from rtpurbo.models.artifact import load_model
        from rtpurbo.models.artifact_config import find_artifact
        from rtpurbo.models.pretrained import LoadingOptions, torch_dtype

        if kwargs.pop("output_loading_info", False):
            raise RTPurboError("output_loading_info is not given for sparse models: leave it out.")
        # What the Auto class found when it was given the folder of an adapter for a sparse model.
        adapter_kwargs = dict(kwargs.pop("adapter_kwargs", None) or {})
        adapter = adapter_kwargs.pop("_adapter_model_path", None)
        adapter_name = kwargs.pop("adapter_name", "default")
        kwargs |= {"token": token, "cache_dir": cache_dir}
        kwargs |= {"device_map": device_map, "quantization_config": quantization_config}
        options = {
            name: value
            for name, value in kwargs.items()
            if name not in _OF_AUTO_CLASSES and value is not None
        }
        hub = {name: options.pop(name) for name in _HUB if name in options}
        dtype = options.pop("torch_dtype", dtype)
        folder = find_artifact(pretrained_model_name_or_path, revision=revision, **hub)
        model, _ = load_model(
            folder,
            LoadingOptions(hub, options, torch_dtype(dtype)),
            base_model=base_model,
        )
        # Adapters trained on the model name this as their base.
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        if adapter is not None:
            model.load_adapter(adapter, adapter_name=adapter_name, adapter_kwargs=adapter_kwargs)
        return model

    @classmethod
    def _from_config(cls, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Refuses: `from_config` of the Auto classes would make a model of random weights.

        Raises:
            RTPurboError: always.
        """
        raise RTPurboError("a sparse model is not made from a configuration: use from_pretrained.")


AutoModelForCausalLM.register(RTPurboModelConfig, AutoRTPurboModelForCausalLM, exist_ok=True)

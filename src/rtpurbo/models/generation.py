"""Makes `generate` and plain calls of a sparse model use a HeadwiseCache without being told."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rtpurbo.models.cache import HeadwiseCache


def attach_cache(model: PreTrainedModel) -> None:
    """Gives this one model (no class is touched) a HeadwiseCache wherever it would make its own."""
    prepare = model._prepare_cache_for_generation

    def prepare_cache(
        generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            generation_config.cache_implementation = None
            model_kwargs["past_key_values"] = HeadwiseCache(model)
        return prepare(generation_config, model_kwargs, *args, **kwargs)

    def provide_cache(
        module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = model.config.use_cache
        if use_cache and kwargs.get("past_key_values") is None and len(args) < 4:
            # Training needs no cache, and the model would make one of its own.
            own = (
                {"use_cache": False}
                if module.training
                else {"past_key_values": HeadwiseCache(model)}
            )
            kwargs = {**kwargs, **own}
        return args, kwargs

    model._prepare_cache_for_generation = prepare_cache
    model._rtpurbo_hook = model.base_model.register_forward_pre_hook(
        provide_cache, with_kwargs=True
    )


def detach_cache(model: PreTrainedModel) -> None:
    """Undoes `attach_cache`."""
    del model._prepare_cache_for_generation
    model._rtpurbo_hook.remove()
    del model._rtpurbo_hook

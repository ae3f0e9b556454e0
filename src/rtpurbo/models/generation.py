"""Makes `generate` and plain calls of a sparse model use a HeadwiseCache without being told.

Every forward passes here first: so this is also where padding is looked at, once for all layers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rtpurbo.errors import RTPurboError
from rtpurbo.models.arguments import CACHE_NAME, named
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.decoder import decoder_of
from rtpurbo.models.decoding import attach_decoder, detach_decoder
from rtpurbo.models.slots import padding_form


def attach_cache(model: PreTrainedModel) -> None:
    """Gives this one model (no class is touched) a HeadwiseCache wherever it would make its own."""
    prepare = model._prepare_cache_for_generation
    decoder = decoder_of(model)

    def prepare_cache(
        generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            generation_config.cache_implementation = None
            model_kwargs[CACHE_NAME] = HeadwiseCache(model)
        cache = model_kwargs.get(CACHE_NAME)
        if isinstance(cache, HeadwiseCache):
            cache.expected_length = generation_config.max_length or 0
        return prepare(generation_config, model_kwargs, *args, **kwargs)

    def provide_cache(
        module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        kwargs = named(module, args, kwargs)
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = model.config.use_cache
        if use_cache and kwargs.get(CACHE_NAME) is None:
            # Training needs no cache, and the model would make one of its own.
            own = {"use_cache": False} if module.training else {CACHE_NAME: HeadwiseCache(model)}
            kwargs = {**kwargs, **own}
        kwargs["attention_mask"] = needed_mask(kwargs)
        return (), kwargs

    model._prepare_cache_for_generation = prepare_cache
    model._rtpurbo_hook = decoder.register_forward_pre_hook(provide_cache, with_kwargs=True)
    attach_decoder(model)


def needed_mask(arguments: dict[str, Any]) -> Any:
    """The attention mask that a forward still needs, once its cache knows how it is padded.

    Raises:
        RTPurboError: the mask is not one of tokens.
    """
    mask, cache = arguments.get("attention_mask"), arguments.get(CACHE_NAME)
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise RTPurboError(
            "sparse attention takes a 2D attention mask (1 for tokens, 0 for padding), or none."
        )
    if cache is not None and not isinstance(cache, HeadwiseCache):
        raise RTPurboError(
            f"a sparse model needs a HeadwiseCache, not a {type(cache).__name__}: "
            "pass rtpurbo.HeadwiseCache(model), or none."
        )
    if cache is not None:
        tokens = arguments.get("input_ids")
        if tokens is None:
            tokens = arguments["inputs_embeds"]
        return cache.enter(mask, tokens.shape[0], tokens.shape[1], tokens.device)
    return None if mask is None or padding_form(mask)[0] == "none" else mask


def detach_cache(model: PreTrainedModel) -> None:
    """Undoes `attach_cache`."""
    detach_decoder(model)
    del model._prepare_cache_for_generation
    model._rtpurbo_hook.remove()
    del model._rtpurbo_hook

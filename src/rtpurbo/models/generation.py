"""Pre-hook of a sparse model's decoder that creates a HeadwiseCache and prepares the mask.

It runs once for each forward, so it also computes slots and padding for all layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rtpurbo.errors import RTPurboError
from rtpurbo.models.arguments import CACHE_NAME, named, positions_follow_mask
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.pretrained import refuse_offloading
from rtpurbo.models.slots import fitting_mask, padding_form
from rtpurbo.models.text_part import OTHER_MODALITIES


class CacheProvider:
    """Forward pre-hook of a sparse model's decoder that provides a cache and the attention mask.

    An object rather than a closure, so that a copy of the model has its own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.positions_follow_mask = positions_follow_mask(model)

    def __call__(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """Returns the arguments of the decoder's forward, with a cache if it would make one."""
        kwargs = named(module, args, kwargs)
        self._check(kwargs)
        use_cache = kwargs.get("use_cache")
        if use_cache is None:
            use_cache = self.model.config.use_cache
        if use_cache and kwargs.get(CACHE_NAME) is None:
            # Training needs no cache, and the model would make one of its own.
            cached = {CACHE_NAME: HeadwiseCache(self.model)}
            kwargs = {**kwargs, **({"use_cache": False} if module.training else cached)}
        mask = needed_mask(kwargs)
        if mask is not None or not self.positions_follow_mask:
            kwargs["attention_mask"] = mask
        return (), kwargs

    def _check(self, arguments: dict[str, Any]) -> None:
        """Refuses arguments that the decoder would ignore or compute wrongly.

        Raises:
            RTPurboError: attention weights are asked for, an image is given, or weights were offloaded meanwhile.
        """
        asked = arguments.get("output_attentions")
        if self.model.config.output_attentions if asked is None else asked:
            raise RTPurboError(
                "a sparse model has no attention weights to return: leave output_attentions out, or "
                "restore the dense model with rtpurbo.restore."
            )
        other = [name for name in OTHER_MODALITIES if arguments.get(name) is not None]
        if other:
            raise RTPurboError(
                f"a sparse model takes text alone, not {other[0]}: it is the text decoder of its "
                "multimodal model."
            )
        if hasattr(self.model, "_hf_hook"):
            refuse_offloading(self.model)


def needed_mask(arguments: dict[str, Any]) -> Any:
    """Assigns slots in the cache, if any, and returns the attention mask that layers still need.

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
    tokens = arguments.get("input_ids")
    if tokens is None:
        tokens = arguments["inputs_embeds"]
    if cache is not None:
        _check_rows(cache, tokens.shape[0])
        if not torch.is_inference_mode_enabled():
            leave_inference_mode(cache, tokens.shape[0])
        return cache.begin_forward(mask, tokens.shape[0], tokens.shape[1], tokens.device)
    if mask is None:
        return None
    fitting_mask(mask, *tokens.shape[:2])
    return None if padding_form(mask)[0] == "none" else mask


def _check_rows(cache: HeadwiseCache, batch: int) -> None:
    """Refuses a cache with another number of sequences.

    Raises:
        RTPurboError: the numbers differ.
    """
    positions = cache.slots.ring.positions
    if cache.get_seq_length() and positions is not None and positions.shape[0] != batch:
        raise RTPurboError(
            f"the cache holds {positions.shape[0]} sequences, but the forward has {batch}: call "
            "cache.batch_repeat_interleave first to give each beam or sample its own copy."
        )


def leave_inference_mode(cache: HeadwiseCache, batch: int) -> None:
    """Copies tensors that were made in inference mode, which cannot be written to outside of it."""
    if any(tensor.is_inference() for tensor in cache.slots.tensors()):
        cache.batch_select_indices(torch.arange(batch))

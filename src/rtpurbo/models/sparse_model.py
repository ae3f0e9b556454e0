"""A model while it is sparse: a subclass of its dense class, and a hook of its decoder."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from rtpurbo.config import DEFAULT_CROP_SLACK
from rtpurbo.errors import RTPurboError
from rtpurbo.models.arguments import CACHE_NAME, named, positions_follow_mask
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.decoding import dense_class
from rtpurbo.models.pretrained import refuse_offloading
from rtpurbo.models.saving import save_sparse
from rtpurbo.models.slots import fitting_mask, padding_form
from rtpurbo.models.sparse_layers import check_is_not_wrapped
from rtpurbo.models.text_part import OTHER_MODALITIES

_sparse_classes: dict[type, type] = {}


class SparseModel(PreTrainedModel, GenerationMixin):
    """Methods of a sparse model that replace those of its dense class, which follows in the MRO.

    Attributes of an instance: `rtpurbo_config` (an `RTPurboConfig`) and `rtpurbo` (a `Runtime`).
    """

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Writes a folder that loads as the same sparse model, with or without its base model.

        `push_to_hub` and `Trainer.save_model` write the same. The folder loads with
        `AutoRTPurboModelForCausalLM`, and with `AutoModelForCausalLM` where rtpurbo is imported.
        Arguments are as for `PreTrainedModel.save_pretrained`; other files in the folder stay.
        """
        save_sparse(self, super().save_pretrained, save_directory, **kwargs)

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Refuses: the layers that are sparse have an implementation of their own.

        Raises:
            RTPurboError: always.
        """
        raise RTPurboError(
            "the attention implementation of a sparse model cannot be changed: restore the dense "
            "model with rtpurbo.restore first."
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Creates a HeadwiseCache where `generate` would create a cache of its own."""
        if model_kwargs.get(CACHE_NAME) is None and generation_config.use_cache is not False:
            generation_config.cache_implementation = None
            # Proposed tokens that are rejected are cropped: from the prompt, or of the draft model itself.
            proposed = generation_config.prompt_lookup_num_tokens or 0
            if generation_config.is_assistant:
                proposed = max(proposed, int(self.generation_config.num_assistant_tokens or 0))
            slack = max(DEFAULT_CROP_SLACK, proposed + 1)
            made = HeadwiseCache(self, crop_slack=slack)
            if generation_config.is_assistant and hasattr(made, "activate_past_recording"):
                # As transformers does for a draft's cache of its own: windowed layers then can be cropped.
                made.activate_past_recording()
            model_kwargs[CACHE_NAME] = made
        cache = model_kwargs.get(CACHE_NAME)
        if isinstance(cache, HeadwiseCache):
            cache.expected_length = generation_config.max_length or 0
        return super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Copies and pickles through the dense class, because this class is in no module."""
        return _new, (dense_class(self),), dict(vars(self))


def sparse_class(dense: type) -> type:
    """Returns the sparse subclass of a dense class, which has the same name and follows in its MRO."""
    if dense not in _sparse_classes:
        dense_forward: Any = dense.forward  # type: ignore[attr-defined]

        @wraps(dense_forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            arguments = named(self, args, kwargs)
            output = self._rtpurbo_decoder.step(self, arguments)
            return dense_forward(self, **arguments) if output is None else output

        # transformers looks classes up by name and module: in configurations, and in their source.
        names = ("__module__", "__qualname__", "__doc__")
        own = {"forward": forward, **{name: getattr(dense, name) for name in names}}
        bases: tuple[Any, ...] = (SparseModel, dense)
        _sparse_classes[dense] = type(dense.__name__, bases, own)
    return _sparse_classes[dense]


def check_can_be_sparse(model: Any) -> None:
    """Refuses objects other than whole transformers models with a language-modelling head.

    Raises:
        RTPurboError: it is of another kind, its heads are divided among processes, or its weights are
            offloaded or packed away by a quantisation.
    """
    check_is_not_wrapped(model)
    kind = type(model).__name__
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise RTPurboError(
            f"a {kind} has no language-modelling head that generates: load the checkpoint with "
            "AutoModelForCausalLM."
        )
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise RTPurboError(
            "the model's heads are divided among processes (tensor parallelism), but every head has its own "
            "window, indexer and part of the cache: load it without tp_plan."
        )
    refuse_offloading(model)
    for name, module in model.base_model.named_modules():
        if name.endswith("self_attn") and next(module.parameters(), None) is None:
            raise RTPurboError(
                f"{name} has no weights as parameters, so it was quantised in a way that sparse "
                "attention does not know: quantise while loading, with a quantization_config."
            )


def _new(dense: type) -> Any:
    return object.__new__(sparse_class(dense))


class CacheProvider:
    """Forward pre-hook of a sparse model's decoder that provides a cache and the attention mask.

    It runs once for each forward, so it also computes slots and padding for all layers. An object rather than a
    closure, so that a copy of the model has its own.
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

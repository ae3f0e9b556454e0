"""Text decoders of multimodal checkpoints, loaded as causal language models.

A vision-language checkpoint has a composite configuration, and stores the weights of its text decoder
under a prefix. transformers loads them into the class of a text model, given the text configuration and
a mapping of names; vision weights are not read.
"""

from __future__ import annotations

import copy
import re
from typing import ClassVar

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationMixin,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter

from rtpurbo.errors import RTPurboError, first_line
from rtpurbo.models.architecture import is_text_part
from rtpurbo.models.decoder import decoder_of
from rtpurbo.models.verification import NUM_TOKENS, logits_difference

# Names of the text decoder's module in the wrappers of transformers.
_DECODER_NAMES = r"(?:language_model|text_model|llm)"
# Settings that a composite configuration holds for its text part too.
_SHARED_SETTINGS = ("dtype", "quantization_config")
# Inputs of other modalities, which a text decoder would ignore.
OTHER_MODALITIES = ("pixel_values", "pixel_values_videos", "image_embeds", "input_features")


def is_composite(config: PretrainedConfig) -> bool:
    """True if a configuration has a text part and parts of other modalities."""
    return config.get_text_config(decoder=True) is not config and not config.is_encoder_decoder


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """Returns a copy of the text part of a composite configuration, complete in itself.

    Raises:
        RTPurboError: transformers has no image-text-to-text class for the composite model, against
            which the text decoder is checked.
    """
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise RTPurboError(
            f"this {config.model_type} model cannot be made sparse: it is neither a causal language "
            "model nor an image-text-to-text model of transformers."
        )
    text: PretrainedConfig = copy.deepcopy(config.get_text_config(decoder=True))
    # The output embedding belongs to the wrapper, which ties it by its own setting.
    if hasattr(config, "tie_word_embeddings"):
        text.tie_word_embeddings = config.tie_word_embeddings
    for name in _SHARED_SETTINGS:
        if getattr(text, name, None) is None and getattr(config, name, None) is not None:
            setattr(text, name, getattr(config, name))
    text.name_or_path = config.name_or_path
    return text


def register_text_class(config: PretrainedConfig) -> None:
    """Registers a causal language model with `AutoModelForCausalLM` for an `is_text_part` without a class."""
    if is_text_part(config.model_type) and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        made = _text_class(type(config))
        # transformers registers nothing for a configuration of its own without `exist_ok`.
        AutoModelForCausalLM.register(type(config), made, exist_ok=True)
        if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            # transformers 5.17 and older ignore `exist_ok` there.
            MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[type(config)] = made
        _register_conversions(config.model_type)


def _register_conversions(model_type: str) -> None:
    """Lets transformers convert the weights of a text decoder as in its multimodal model: experts into one tensor."""
    known = get_checkpoint_conversion_mapping(model_type.removesuffix("_text")) or []
    converters = [one for one in known if isinstance(one, WeightConverter)]
    if converters and get_checkpoint_conversion_mapping(model_type) is None:
        register_checkpoint_conversion_mapping(model_type, converters)


def key_mapping(config: PretrainedConfig) -> dict[str, str]:
    """Returns the names in a multimodal checkpoint, as regular expressions, with those of the registered text model."""
    prefix = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].base_model_prefix
    own = rf"(?=(?:{re.escape(prefix)}|lm_head)\.)"
    return {
        # A causal language model inside the wrapper, then a bare decoder.
        rf"^(?:model\.)?{_DECODER_NAMES}\.{own}": "",
        rf"^(?:model\.)?{_DECODER_NAMES}\.": f"{prefix}.",
    }


def forget_key_mapping(model: PreTrainedModel, mapping: dict[str, str]) -> None:
    """Lets `save_pretrained` write the text model's own names instead of those it was loaded from."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        kept = [one for one in conversions if not set(one.source_patterns) & set(mapping)]
        model._weight_conversions = kept or None


def settle_tied_embeddings(model: PreTrainedModel) -> None:
    """Corrects the configuration of a model whose checkpoint holds an output embedding of its own.

    Wrappers of transformers tie by default, except where the checkpoint has both weights.
    """
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    if is_tied and output.weight is not embedding.weight:
        model.config.tie_word_embeddings = False


@torch.no_grad()
def check_text_part(model: PreTrainedModel, config: PretrainedConfig) -> None:
    """Refuses a text model whose logits differ from those of its whole, composite model for a text.

    Raises:
        RTPurboError: the logits differ, or the multimodal model does not run without its other parts.
    """
    prefix = f"the text decoder of this {config.model_type} model cannot be made sparse:"
    # Random, but none that stands for an image.
    special = {
        value for name, value in config.to_dict().items() if re.search("token_(id|index)$", name)
    }
    allowed = torch.tensor([one for one in range(model.config.vocab_size) if one not in special])
    generator = torch.Generator().manual_seed(0)
    tokens = allowed[torch.randint(len(allowed), (1, NUM_TOKENS), generator=generator)]
    tokens = tokens.to(model.get_input_embeddings().weight.device)
    run = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    try:
        with torch.device("meta"):
            wrapper = AutoModelForImageTextToText.from_config(
                copy.deepcopy(config), attn_implementation=model.config._attn_implementation
            )
        if any(type(part) is type(model) for part in wrapper.modules()):
            # It returns the logits of a causal language model inside of it, which is this one.
            return
        _place_text_model(model, wrapper.eval())
        expected = wrapper(**run).logits
    except Exception as error:  # any wrapper's own code runs here
        reason = first_line(error, with_type=True)
        raise RTPurboError(f"{prefix} the model does not run on text alone ({reason}).") from error
    model.eval()
    actual = model(**run).logits
    difference, limit = logits_difference(actual, expected)
    if not difference <= limit:
        raise RTPurboError(
            f"{prefix} alone, its logits differ from those of the whole model by {difference:.1e} of "
            f"their size, and at most {limit:g} is allowed."
        )


def _place_text_model(model: PreTrainedModel, wrapper: PreTrainedModel) -> None:
    """Replaces the text decoder of a multimodal model on the meta device and removes its other parts."""
    inner, decoder = wrapper.get_decoder(), decoder_of(model)
    path = next(name for name, module in wrapper.named_modules() if module is inner)
    wrapper.set_submodule(path, decoder)
    wrapper.set_output_embeddings(model.get_output_embeddings())
    # Some wrappers move their inputs to the device of their first parameter.
    for owner in (wrapper, *(module for module in wrapper.children() if module is not decoder)):
        for name, part in list(owner.named_children()):
            weights = list(part.parameters())
            if part is not decoder and weights and all(weight.is_meta for weight in weights):
                setattr(owner, name, nn.Identity())


class TextDecoderForCausalLM(PreTrainedModel, GenerationMixin):
    """Text decoder with an output embedding; base of classes that `register_text_class` makes."""

    base_model_prefix = "model"
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.model = MODEL_MAPPING[type(config)](config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    # Runs `model` and `lm_head`, with the argument names of the installed transformers.
    forward = LlamaForCausalLM.forward


def _text_class(config_class: type[PretrainedConfig]) -> type[PreTrainedModel]:
    """A causal language model for a type of text decoder, with what transformers knows of its family."""
    decoder = MODEL_MAPPING[config_class]
    family = next(base for base in decoder.__mro__[1:] if issubclass(base, PreTrainedModel))
    name = f"{decoder.__name__.removesuffix('Model')}ForCausalLM"
    own = {"__module__": __name__, "config_class": config_class}
    made = type(name, (TextDecoderForCausalLM, family), {**own, "__doc__": decoder.__doc__})
    # Pickle finds classes by the name in their module.
    globals()[name] = made
    return made

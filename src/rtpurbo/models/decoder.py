"""The decoder layers of a loaded model, and the linear layers in them that a LoRA adapts."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from rtpurbo.errors import RTPurboError


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The module that runs the decoder layers, which a causal language model calls."""
    decoder = model.get_decoder()
    if isinstance(decoder, PreTrainedModel) and decoder is not model:
        return decoder
    # Some models find themselves, others their output embedding.
    return next(child for child in model.children() if isinstance(child, PreTrainedModel))


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The layers of a model's decoder.

    Raises:
        RTPurboError: the model has none.
    """
    count = model.config.num_hidden_layers
    for module in decoder_of(model).modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return child
    raise RTPurboError(f"no decoder layers were found in this {type(model).__name__}.")


def projections(layer: nn.Module, *, beyond_attention: bool) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a decoder layer, by the last part of their names.

    Args:
        layer: a decoder layer.
        beyond_attention: those of the MLP too, instead of the attention's alone.
    """
    for path, module in layer.named_modules():
        *parents, name = path.split(".")
        in_attention = any("attn" in parent or "attention" in parent for parent in parents)
        if isinstance(module, nn.Linear) and (in_attention or beyond_attention):
            yield name, module

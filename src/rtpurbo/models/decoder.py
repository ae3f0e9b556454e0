"""Decoder layers of a loaded model, and their linear layers that LoRA adapts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from rtpurbo.errors import RTPurboError


def decoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the module that runs the decoder layers of a causal language model; itself if there is no other."""
    decoder = model.get_decoder()
    if isinstance(decoder, PreTrainedModel) and decoder is not model:
        return decoder
    # Some models return themselves, others their output embedding.
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the layers of a model's decoder.

    Raises:
        RTPurboError: the model has none.
    """
    count = model.config.num_hidden_layers
    for module in decoder_of(model).modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and len(child) == count:
                return child
    raise RTPurboError(f"no decoder layers were found in this {type(model).__name__}.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets all modules to evaluation mode inside a `with` block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def projections(layer: nn.Module, *, beyond_attention: bool) -> Iterator[tuple[str, nn.Linear]]:
    """Yields the linear layers of a decoder layer's attention, and of its MLP, with the last part of their names."""
    for path, module in layer.named_modules():
        *parents, name = path.split(".")
        in_attention = any("attn" in parent or "attention" in parent for parent in parents)
        if isinstance(module, nn.Linear) and (in_attention or beyond_attention):
            yield name, module

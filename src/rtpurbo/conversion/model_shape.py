"""Sizes of a model that the expected memory and time of a conversion depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rtpurbo.models.architecture import (
    AttentionShape,
    attention_shapes,
    check_architecture,
    convertible_shapes,
)
from rtpurbo.models.decoder import decoder_layers, projections
from rtpurbo.settings import DistillationSettings


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that memory and time depend on.

    Attributes:
        parameters: parameters of the whole model.
        decoder_parameters: parameters of all decoder layers, which FSDP shards.
        layer_parameters: parameters of all decoder layers that are active for one token.
        lora_features: sum of input and output features of the linear layers that a LoRA adapts, without and with
            (True) those beyond the attention; times the rank it is the number of parameters of the LoRA.
        num_layers: number of decoder layers.
        attention: heads of each layer with attention.
        full_attention: heads of each layer with full attention, which is converted.
        layer_window: window of the other layers, in tokens.
        hidden_size: width of the residual stream.
        mlp_size: width of the MLP that is active for one token.
        vocabulary: size of the vocabulary.
    """

    parameters: int
    decoder_parameters: int
    layer_parameters: int
    lora_features: dict[bool, int]
    num_layers: int
    attention: tuple[AttentionShape, ...]
    full_attention: tuple[AttentionShape, ...]
    layer_window: int
    hidden_size: int
    mlp_size: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """Returns the sizes of a model; parameters are counted on the meta device, without memory.

        Args:
            config: text configuration of a supported model.
        """
        check_architecture(config)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        experts = getattr(config, "num_experts", None) or 1
        active_experts = getattr(config, "num_experts_per_tok", None) or 1
        used = decoder_parameters = 0
        layers = decoder_layers(model)
        for name, parameter in layers.named_parameters():
            decoder_parameters += parameter.numel()
            share = active_experts / experts if ".experts." in name else 1
            used += round(share * parameter.numel())
        features = {
            beyond: sum(
                module.in_features + module.out_features
                for layer in layers
                for _, module in projections(layer, beyond_attention=beyond)
            )
            for beyond in (False, True)
        }
        mlp_size = config.intermediate_size
        if experts > 1:
            mlp_size = active_experts * getattr(config, "moe_intermediate_size", mlp_size)
        return cls(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            decoder_parameters=decoder_parameters,
            layer_parameters=used,
            lora_features=features,
            num_layers=config.num_hidden_layers,
            attention=tuple(attention_shapes(config).values()),
            full_attention=tuple(convertible_shapes(config).values()),
            layer_window=getattr(config, "sliding_window", None) or 0,
            hidden_size=config.hidden_size,
            mlp_size=mlp_size,
            vocabulary=config.vocab_size,
        )

    @property
    def num_heads(self) -> int:
        """Query heads of all converted layers."""
        return sum(shape.num_attention_heads for shape in self.full_attention)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of all converted layers."""
        return sum(shape.num_key_value_heads for shape in self.full_attention)

    @property
    def head_dim(self) -> int:
        """Dimensions of the largest head of the converted layers."""
        return max(shape.head_dim for shape in self.full_attention)

    def forward_flops(self, length: int, window: int | None = None, share: float = 0.0) -> float:
        """Returns the operations of one forward over a sequence, without output logits.

        Args:
            length: tokens.
            window: window of local heads; None runs every head dense.
            share: share of dense heads.
        """
        every, full = (
            2 * length**2 * sum(shape.num_attention_heads * shape.head_dim for shape in shapes)
            for shapes in (self.attention, self.full_attention)
        )
        attention = _mixed(every - full, 0.0, length, self.layer_window)
        attention += full if window is None else _mixed(full, share, length, window)
        return 2 * self.layer_parameters * length + attention


def _mixed(quadratic: float, share: float, length: int, window: int) -> float:
    """Returns the operations of causal attention with a share of dense heads and windows for the rest."""
    return quadratic * (share + (1 - share) * min(1.0, 2 * window / length))


def trained_parameters(shape: ModelShape, settings: DistillationSettings) -> int:
    """Returns the number of parameters that stage 2 trains."""
    if not settings.lora_rank:
        return shape.parameters
    return settings.lora_rank * shape.lora_features[settings.lora_beyond_attention]

"""Expected memory and time of a conversion, from the sizes of a model and simple formulas.

Memory is the weights and the larger of two working sets: one decoder layer of the longest sequence
with the attention states that stage 1 keeps, or the layer inputs, gradients and optimiser states of
stage 2. Time is floating-point operations over a nominal throughput, and a fixed cost for
every layer of every pass on a GPU. Both are meant to be right within a factor of about two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from rtpurbo.models.families import attention_modules, convertible_layers, family_of
from rtpurbo.settings import (
    ConversionSettings,
    DistillationSettings,
    IndexerTrainingSettings,
)

THROUGHPUT = {"H100": 4e14, "H200": 4e14, "A100": 2e14, "cuda": 1e14, "cpu": 1e11}
"""Nominal operations per second, by a part of the device's name; `cuda` for other GPUs."""

LAYER_SECONDS = 0.003
"""Fixed cost of one decoder layer in one pass on a GPU: launches, and data that is prepared meanwhile."""

_FP32 = 4
_ADAMW_BYTES = 16
"""Bytes of a trained parameter: fp32 weight, gradient and two moments."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model that memory and time depend on.

    Attributes:
        parameters: of the whole model.
        layer_parameters: parameters of all decoder layers that one token uses; of a mixture of
            experts, those of the experts it is routed to.
        lora_features: inputs and outputs of all linear layers that a LoRA adapts, by whether those
            beyond the attention are among them: a LoRA has so many parameters times its rank.
        num_layers: decoder layers.
        full_layers: layers with full attention, which are converted.
        layer_window: window of the other layers, in tokens.
        num_heads: query heads of a layer.
        num_kv_heads: KV heads of a layer.
        head_dim: dimensions of a head.
        hidden_size: width of the residual stream.
        mlp_size: width of the MLP that one token uses.
        vocabulary: tokens.
    """

    parameters: int
    layer_parameters: int
    lora_features: dict[bool, int]
    num_layers: int
    full_layers: int
    layer_window: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    mlp_size: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """Counts parameters on the meta device, where they take no memory.

        Args:
            config: text configuration of a supported model.
        """
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        experts = getattr(config, "num_experts", None) or 1
        active_experts = getattr(config, "num_experts_per_tok", None) or 1
        used = 0
        for name, parameter in model.base_model.layers.named_parameters():
            share = active_experts / experts if ".experts." in name else 1
            used += round(share * parameter.numel())
        family = family_of(config)
        features = {False: 0, True: 0}
        for layer, _, _ in attention_modules(model):
            for name, module in layer.named_modules():
                last = name.rpartition(".")[2]
                if not isinstance(module, nn.Linear):
                    continue
                size = module.in_features + module.out_features
                if last in family.attention_projections:
                    features[False] += size
                    features[True] += size
                elif last in family.other_projections:
                    features[True] += size
        heads, full_layers = config.num_attention_heads, sum(convertible_layers(config))
        mlp_size = config.intermediate_size
        if experts > 1:
            mlp_size = active_experts * config.moe_intermediate_size
        return cls(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            layer_parameters=used,
            lora_features=features,
            num_layers=config.num_hidden_layers,
            full_layers=full_layers,
            layer_window=getattr(config, "sliding_window", None) or 0,
            num_heads=heads,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            hidden_size=config.hidden_size,
            mlp_size=mlp_size,
            vocabulary=config.vocab_size,
        )

    def forward_flops(self, length: int, window: int | None = None, share: float = 0.0) -> float:
        """Operations of one forward over a sequence, without logits.

        Args:
            length: tokens.
            window: of local heads; None runs every head dense.
            share: of the heads that are dense all the same.
        """
        quadratic = 2 * self.head_dim * length**2
        full = quadratic if window is None else _mixed(quadratic, share, length, window)
        windowed = _mixed(quadratic, 0.0, length, self.layer_window)
        attention = self.full_layers * full + (self.num_layers - self.full_layers) * windowed
        return 2 * self.layer_parameters * length + self.num_heads * attention


def _mixed(quadratic: float, share: float, length: int, window: int) -> float:
    """Operations of causal attention of which a share is dense and the rest has a window."""
    return quadratic * (share + (1 - share) * min(1.0, 2 * window / length))


def trained_parameters(shape: ModelShape, settings: DistillationSettings) -> int:
    """Parameters that stage 2 trains."""
    if not settings.lora_rank:
        return shape.parameters
    return settings.lora_rank * shape.lora_features[settings.lora_beyond_attention]


def peak_bytes(
    shape: ModelShape,
    settings: ConversionSettings,
    *,
    retrieval_heads: int,
    itemsize: int,
    on_gpu: bool,
    shards: int = 1,
) -> float:
    """Expected peak memory of a conversion in one process, in bytes.

    Args:
        shape: of the model.
        settings: of the conversion.
        retrieval_heads: of all layers together.
        itemsize: bytes of a weight.
        on_gpu: whether stage 2 may recompute activations and run in bf16.
        shards: processes among which FSDP divides weights, gradients and optimiser states.
    """
    longest = max(settings.calibration.length, *settings.stage1.lengths, *settings.stage2.lengths)
    forward = longest * _layer_values(shape) * itemsize
    weights, stage2_bytes = shape.parameters * itemsize / shards, 0.0
    if settings.stage2.steps:
        states = trained_parameters(shape, settings.stage2) * _ADAMW_BYTES / shards
        stage2_bytes = states + _activation_bytes(shape, settings.stage2, on_gpu)
    stage1_bytes = _stage1_bytes(shape, settings.stage1, retrieval_heads, itemsize)
    return weights + max(forward + stage1_bytes, stage2_bytes)


def _layer_values(shape: ModelShape) -> int:
    """Values of a token that one decoder layer holds at a time, without gradients."""
    states = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    return 4 * shape.hidden_size + states + 3 * shape.mlp_size


def _stage1_bytes(
    shape: ModelShape, settings: IndexerTrainingSettings, retrieval_heads: int, itemsize: int
) -> float:
    """States that stage 1 keeps, and the scores of one step in fp32."""
    longest = max(settings.lengths)
    queries = settings.rows_per_step or longest
    heads = retrieval_heads
    sequences = settings.probe_sequences + 1
    if settings.steps_per_sequence == 1:
        # Layers learn as they pass, and no layer's states outlive it.
        heads, sequences = math.ceil(retrieval_heads / shape.full_layers), 1
    # Queries, keys and their features: about three head dimensions a token and head.
    kept = sequences * longest * heads * 3 * shape.head_dim * itemsize
    return kept + 3 * queries * longest * heads * _FP32


def _activation_bytes(shape: ModelShape, settings: DistillationSettings, on_gpu: bool) -> float:
    """Activations of stage 2 with their gradients, and logits of the target positions."""
    longest, itemsize = max(settings.lengths), 2 if on_gpu else _FP32
    if on_gpu and settings.gradient_checkpointing:
        inputs, layers = shape.num_layers * shape.hidden_size * _FP32, 1
    else:
        inputs, layers = 0, shape.num_layers
    # The gradients of a layer are as large as its activations.
    activations = longest * (inputs + (layers + 1) * _layer_values(shape) * itemsize)
    labels = min(settings.labels_per_sequence, longest)
    logits = 2 * labels * min(shape.vocabulary, 8192) * _FP32
    return activations + logits


@dataclass(frozen=True)
class StageSeconds:
    """Expected seconds of each stage, without loading the model and reading texts."""

    calibration: float
    stage1: float
    stage2: float
    refresh: float


def stage_seconds(
    shape: ModelShape, settings: ConversionSettings, *, retrieval_heads: int, device_name: str
) -> StageSeconds:
    """Expected time of each stage in one process.

    Args:
        shape: of the model.
        settings: of the conversion; `sequences_per_step` counts as one if it is None.
        retrieval_heads: of all layers together.
        device_name: as `rtpurbo.devices.device_name` gives it.
    """
    share = retrieval_heads / (shape.num_heads * shape.full_layers)
    window = settings.attention.sliding_window
    on_gpu = device_name != "cpu"

    def seconds(flops: float, passes: float) -> float:
        fixed = passes * shape.num_layers * LAYER_SECONDS if on_gpu else 0.0
        return flops / throughput(device_name) + fixed

    def indexers(stage: IndexerTrainingSettings, dense: bool) -> float:
        sequences = stage.steps * (stage.sequences_per_step or 1) / stage.steps_per_sequence
        sequences += stage.probe_sequences + (stage.start_sequences if dense else 0)
        forward = _mean(
            shape.forward_flops(length, None if dense else window, share)
            for length in stage.lengths
        )
        # Exact and estimated scores of the drawn queries, the latter with a backward pass.
        scores = _mean(
            8 * (stage.rows_per_step or length) * length * shape.head_dim * retrieval_heads
            for length in stage.lengths
        )
        return seconds(sequences * forward + stage.steps * scores, sequences + stage.steps)

    stage2 = settings.stage2
    sequences = stage2.steps * (stage2.sequences_per_step or 1)
    # Of a frozen linear layer the backward pass computes one product, of a trained one two.
    student_passes = 2 + (stage2.lora_rank == 0) + (on_gpu and stage2.gradient_checkpointing)
    logits = 6 * stage2.labels_per_sequence * shape.vocabulary * shape.hidden_size
    flops = _mean(
        shape.forward_flops(length) + student_passes * shape.forward_flops(length, window, share)
        for length in stage2.lengths
    )
    has_refresh = stage2.steps > 0 and stage2.refresh_steps > 0
    calibration = settings.calibration
    # A step of gates: the dense model, a mix of it and of windows, and the gradients of that.
    passes = {"turns": 2, "gates": 6}.get(calibration.ranking, 1)
    documents = calibration.num_documents * passes
    return StageSeconds(
        calibration=seconds(documents * shape.forward_flops(calibration.length), documents),
        stage1=indexers(settings.stage1, dense=True),
        stage2=seconds(sequences * (flops + logits), sequences * (1 + student_passes)),
        refresh=indexers(settings.refresh, dense=False) if has_refresh else 0.0,
    )


def throughput(device_name: str) -> float:
    """Nominal operations per second of a device."""
    for part, value in THROUGHPUT.items():
        if part in device_name:
            return value
    return THROUGHPUT["cuda"]


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)

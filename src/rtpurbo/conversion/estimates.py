"""Expected memory and time of a conversion, from the sizes of a model and simple formulas.

Memory is the weights and the largest working set of a stage: layer inputs and gradients of the gates or of
stage 2, caches of the sequences that the model writes, or attention states that stage 1 keeps. Time is
floating-point operations over a nominal throughput, plus a fixed cost of each layer of each pass on a GPU. Both
are accurate to a factor of about two. docs/how-to/memory.md explains the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from rtpurbo.calibration.layer_top_p import TOP_P
from rtpurbo.models.architecture import (
    AttentionShape,
    attention_shapes,
    check_architecture,
    convertible_shapes,
)
from rtpurbo.models.decoder import decoder_layers, projections
from rtpurbo.ops.eager.visibility import MAX_CHUNK_ELEMENTS
from rtpurbo.settings import (
    ConversionSettings,
    DistillationSettings,
    IndexerTrainingSettings,
)
from rtpurbo.training.document_answers import BATCH_TOKENS
from rtpurbo.training.lora_scale import SCALES, SEQUENCES_PER_KIND
from rtpurbo.training.probe import PROBE_QUERIES
from rtpurbo.training.sequences import HELD_OUT
from rtpurbo.training.vocabulary import COLUMNS

THROUGHPUT = {"H100": 4e14, "H200": 4e14, "A100": 2e14, "cuda": 1e14, "cpu": 1e11}
"""Nominal operations per second by part of the device's name; `cuda` is any other GPU."""

LAYER_SECONDS = 0.003
"""Fixed seconds of one decoder layer in one pass on a GPU: launches and data preparation."""

_SELECTION_BYTES = 64
"""Bytes for each score in plain PyTorch: exact and estimated scores, masks, probabilities, sorted values, indices."""

STEP_SECONDS = 0.0015
"""Fixed seconds of one decoder layer in one step of generation on a GPU."""

# Steps of generation before training: of one batch of conversations (user turns in about three rounds, answers
# in two halves) and of one batch of documents.
_CONVERSATION_STEPS, _DOCUMENT_STEPS = 3 * 192 + 2 * 384, 128

_ANSWER_TOKENS = 16
"""Tokens of an answer at which a top-p is measured."""

_FP32 = 4
_ADAMW_BYTES = 16
"""Bytes for each trained parameter: fp32 weight, gradient and two moments."""


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


def peak_bytes(
    shape: ModelShape,
    settings: ConversionSettings,
    *,
    retrieval_heads: int,
    itemsize: int,
    on_gpu: bool,
    shards: int = 1,
) -> float:
    """Returns the expected peak memory of a conversion in one process, in bytes.

    Args:
        shape: sizes of the model.
        settings: settings of the conversion.
        retrieval_heads: retrieval heads of all layers together.
        itemsize: bytes of a weight.
        on_gpu: whether kernels and gradient checkpointing are available.
        shards: processes among which FSDP divides the weights of the decoder layers.
    """
    weights: float = shape.parameters * itemsize
    if shards > 1:
        # Embeddings are not sharded, and the running layer is gathered.
        divided = shape.decoder_parameters * itemsize
        weights += divided * (1 / shards - 1) + divided / shape.num_layers
    calibration, stage2 = settings.calibration, settings.stage2
    stages: list[float] = [calibration.length * _layer_values(shape) * itemsize]
    if calibration.ranking == "gates":
        stages.append(_activation_bytes(shape, calibration.length, itemsize, on_gpu, on_gpu))
    stages.append(_stage1_bytes(shape, settings, retrieval_heads, itemsize, on_gpu))
    if any("documents" in stage.mixture and stage.steps for stage in (settings.stage1, stage2)):
        # KV cache of the documents that the model answers, and one layer of the prefill.
        tokens = max(*settings.stage1.lengths, *stage2.lengths, BATCH_TOKENS // shards)
        cached = 2 * sum(each.num_key_value_heads * each.head_dim for each in shape.attention)
        stages.append(tokens * (cached + _layer_values(shape)) * itemsize)
    if stage2.steps:
        states: float = trained_parameters(shape, stage2) * _ADAMW_BYTES
        if not stage2.lora_rank:
            # The weights are counted above; FSDP shards gradients and moments.
            states = (states - shape.parameters * itemsize) / shards
        longest = max(stage2.lengths)
        targets = min(stage2.targets_per_sequence, longest)
        logits = 2 * targets * min(shape.vocabulary, COLUMNS) * _FP32
        checkpointing = on_gpu and stage2.gradient_checkpointing
        activations = _activation_bytes(shape, longest, itemsize, on_gpu, checkpointing)
        stages.append(states + activations + logits)
    return weights + max(stages)


def _layer_values(shape: ModelShape) -> int:
    """Returns the values of a token in one decoder layer, without gradients."""
    states = max(
        2 * (each.num_attention_heads + each.num_key_value_heads) * each.head_dim
        for each in shape.attention
    )
    return 4 * shape.hidden_size + states + 3 * shape.mlp_size


def _stage1_bytes(
    shape: ModelShape,
    settings: ConversionSettings,
    retrieval_heads: int,
    itemsize: int,
    on_gpu: bool,
) -> float:
    """Returns the bytes of the states that stage 1 keeps and of a forward, a step or a probe."""
    stage, longest = settings.stage1, max(settings.stage1.lengths)
    heads, kv_heads, layers = retrieval_heads, shape.num_kv_heads, len(shape.full_attention)
    if settings.calibration.granularity == "kv_group":
        kv_heads = math.ceil(heads * shape.num_kv_heads / shape.num_heads)
    kv_heads = min(kv_heads, heads)
    sequences = 1 + stage.probe_sequences
    queries = stage.queries_per_step or longest
    kept_queries = min(longest, queries * stage.steps_per_sequence)
    if stage.steps_per_sequence == 1:
        # Layer-wise training frees the states of each layer.
        heads, kv_heads = (math.ceil(count / layers) for count in (heads, kv_heads))
        sequences, kept_queries = 1, longest
    # States, and the features that the indexer projects.
    kept = (kv_heads * longest + heads * kept_queries) * 2 * shape.head_dim * itemsize
    scored = heads if on_gpu else math.ceil(retrieval_heads / layers)
    # Index keys with a copy, their gradients twice; features of KV heads in fp32.
    step = longest * (4 * scored * settings.indexer.index_dim + kv_heads * shape.head_dim) * _FP32
    # The probe computes scores, masks and sorted keys in plain PyTorch, in chunks of queries.
    chunk = max(scored * longest, min(MAX_CHUNK_ELEMENTS, PROBE_QUERIES * scored * longest))
    forward = longest * _layer_values(shape) * itemsize
    working = (step, chunk * _SELECTION_BYTES)
    if stage.steps_per_sequence == 1:
        return kept + forward + max(working)
    return sequences * kept + max(forward, *working)


def _activation_bytes(
    shape: ModelShape, length: int, itemsize: int, on_gpu: bool, checkpointing: bool
) -> float:
    """Returns the bytes of a sequence's activations with gradients: of one layer plus all inputs, or of all layers.

    Args:
        shape: sizes of the model.
        length: tokens.
        itemsize: bytes of a weight and of a value of the residual stream.
        on_gpu: whether layers run in bf16.
        checkpointing: whether activations are recomputed in the backward pass.
    """
    inputs, layers = 0, shape.num_layers
    if checkpointing:
        inputs, layers = shape.num_layers * shape.hidden_size * itemsize, 1
    # The gradients of a layer are as large as its activations.
    return length * (inputs + (layers + 1) * _layer_values(shape) * (2 if on_gpu else _FP32))


@dataclass(frozen=True)
class StageSeconds:
    """Expected seconds of each stage, without loading the model and texts."""

    writing: float
    calibration: float
    stage1: float
    stage2: float
    refresh: float
    top_p: float


def stage_seconds(
    shape: ModelShape,
    settings: ConversionSettings,
    *,
    retrieval_heads: int,
    device_name: str,
    processes: int = 1,
) -> StageSeconds:
    """Returns the expected time of each stage.

    Args:
        shape: sizes of the model.
        settings: resolved settings of the conversion.
        retrieval_heads: retrieval heads of all layers together.
        device_name: result of `rtpurbo.devices.device_name`.
        processes: number of processes that share the sequences of a step.
    """
    share = retrieval_heads / shape.num_heads
    window = settings.attention.sliding_window
    on_gpu = device_name != "cpu"

    def seconds(flops: float, passes: float) -> float:
        fixed = passes * shape.num_layers * LAYER_SECONDS if on_gpu else 0.0
        return flops / throughput(device_name) + fixed

    def indexers(stage: IndexerTrainingSettings, dense: bool) -> float:
        sequences = stage.steps * (stage.per_step / processes) / stage.steps_per_sequence
        sequences += stage.probe_sequences + (stage.init_sequences if dense else 0)
        forward = _mean(
            shape.forward_flops(length, None if dense else window, share)
            for length in stage.lengths
        )
        # Exact and estimated scores of the drawn queries, and a backward pass of the latter.
        scores = _mean(
            8 * (stage.queries_per_step or length) * length * shape.head_dim * retrieval_heads
            for length in stage.lengths
        )
        return seconds(sequences * forward + stage.steps * scores, sequences + stage.steps)

    stage2 = settings.stage2
    sequences = stage2.steps * (stage2.per_step / processes)
    # The backward pass of a frozen linear layer is one product, that of a trained one two.
    student_passes = 2 + (stage2.lora_rank == 0) + (on_gpu and stage2.gradient_checkpointing)
    logits = 6 * stage2.targets_per_sequence * shape.vocabulary * shape.hidden_size
    flops = _mean(
        shape.forward_flops(length) + student_passes * shape.forward_flops(length, window, share)
        for length in stage2.lengths
    )
    measured = 0.0
    if stage2.steps and stage2.lora_scale is None:
        kinds = len(stage2.mixture) + 1  # prose
        forwards = len(SCALES) * SEQUENCES_PER_KIND * kinds
        forward = _mean(shape.forward_flops(each, window, share) for each in stage2.lengths)
        measured = seconds(forwards * forward, forwards)
    has_refresh = stage2.steps > 0 and stage2.refresh_steps > 0
    calibration = settings.calibration
    # A step of gates: the dense model, the gated one, and its gradients.
    passes = {"interleaved": 2, "gates": 6}.get(calibration.ranking, 1)
    documents = calibration.num_documents * passes
    # Each value of p in each layer with retrieval heads takes a forward pass of an answer's tokens.
    tried = calibration.top_p_sequences * min(shape.num_layers, retrieval_heads) * (len(TOP_P) + 1)
    by_layer = 0.0
    if tried and settings.attention.layer_top_p is None:
        prompts = calibration.top_p_sequences * shape.forward_flops(calibration.length)
        by_layer = seconds(prompts + 2 * shape.parameters * _ANSWER_TOKENS * tried, tried)
    return StageSeconds(
        writing=_writing_seconds(shape, stage2, device_name),
        calibration=seconds(documents * shape.forward_flops(calibration.length), documents),
        stage1=indexers(settings.stage1, dense=True),
        stage2=seconds(sequences * (flops + logits), sequences * (1 + student_passes)) + measured,
        refresh=indexers(settings.refresh, dense=False) if has_refresh else 0.0,
        top_p=by_layer,
    )


def _writing_seconds(shape: ModelShape, stage2: DistillationSettings, device_name: str) -> float:
    """Returns the seconds that writing conversations and document answers takes."""
    generated = read = tokens = 0.0
    conversations, documents = map(stage2.mixture.get, ("conversations", "documents"))
    if stage2.steps and conversations:
        generated += _CONVERSATION_STEPS
        tokens += (conversations * stage2.steps + HELD_OUT) * _CONVERSATION_STEPS / 2
    if stage2.steps and documents:
        documents = documents * stage2.steps + HELD_OUT
        each = documents / len(stage2.lengths)
        batches = sum(2 * math.ceil(each * length / 2 / BATCH_TOKENS) for length in stage2.lengths)
        generated += batches * _DOCUMENT_STEPS
        tokens += documents * _DOCUMENT_STEPS
        read = documents * _mean(shape.forward_flops(length) for length in stage2.lengths)
    flops = read + 2 * shape.parameters * tokens
    fixed = 0.0 if device_name == "cpu" else generated * shape.num_layers * STEP_SECONDS
    return flops / throughput(device_name) + fixed


def throughput(device_name: str) -> float:
    """Returns the nominal operations per second of a device."""
    for part, value in THROUGHPUT.items():
        if part in device_name:
            return value
    return THROUGHPUT["cuda"]


def _mean(values: Any) -> float:
    listed = list(values)
    return sum(listed) / len(listed)

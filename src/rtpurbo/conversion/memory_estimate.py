"""Expected memory of a conversion, accurate to a factor of about two.

It is the weights and the largest working set of a stage: layer inputs and gradients of the gates or of stage 2,
caches of the sequences that the model writes, or attention states that stage 1 keeps. docs/how-to/memory.md
explains the formulas.
"""

from __future__ import annotations

import math

from rtpurbo.conversion.model_shape import ModelShape, trained_parameters
from rtpurbo.ops.eager.visibility import MAX_CHUNK_ELEMENTS
from rtpurbo.settings import ConversionSettings
from rtpurbo.training.document_answers import BATCH_TOKENS
from rtpurbo.training.probe import PROBE_QUERIES
from rtpurbo.training.vocabulary import COLUMNS

_SELECTION_BYTES = 64
"""Bytes for each score in plain PyTorch: exact and estimated scores, masks, probabilities, sorted values, indices."""

_FP32 = 4

_ADAMW_BYTES = 16
"""Bytes for each trained parameter: fp32 weight, gradient and two moments."""


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
    trains = stage.steps > 0
    sequences = trains + stage.probe_sequences
    queries = stage.queries_per_step or longest
    kept_queries = min(longest, queries * stage.steps_per_sequence)
    if stage.steps_per_sequence == 1:
        # Layer-wise training frees the states of each layer.
        heads, kv_heads = (math.ceil(count / layers) for count in (heads, kv_heads))
        sequences, kept_queries = 1, longest
    # States, and the features that the indexer projects.
    kept = (kv_heads * longest + heads * kept_queries) * 2 * shape.head_dim * itemsize
    scored = heads if on_gpu else math.ceil(retrieval_heads / layers)
    # Index keys with a copy, their gradients twice, if they are trained; features of KV heads in fp32.
    trained = 4 * scored * settings.indexer.index_dim * trains
    step = longest * (trained + kv_heads * shape.head_dim) * _FP32
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

"""Expected time of a conversion, accurate to a factor of about two.

It is floating-point operations over a nominal throughput, plus a fixed cost of each layer of each pass on a GPU.
docs/how-to/memory.md explains the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean

from rtpurbo.calibration.budget import SEQUENCES
from rtpurbo.calibration.layer_top_p import TOP_P
from rtpurbo.conversion.model_shape import ModelShape
from rtpurbo.settings import ConversionSettings, DistillationSettings, IndexerTrainingSettings
from rtpurbo.training.document_answers import BATCH_TOKENS
from rtpurbo.training.lora_scale import SCALES, SEQUENCES_PER_KIND
from rtpurbo.training.sequences import HELD_OUT

THROUGHPUT = {"H100": 4e14, "H200": 4e14, "A100": 2e14, "cuda": 1e14, "cpu": 1e11}
"""Nominal operations per second by part of the device's name; `cuda` is any other GPU."""

LAYER_SECONDS = 0.003
"""Fixed seconds of one decoder layer in one pass on a GPU: launches and data preparation."""

STEP_SECONDS = 0.0015
"""Fixed seconds of one decoder layer in one step of generation on a GPU."""

# Steps of generation before training: of one batch of conversations (user turns in about three rounds, answers
# in two halves) and of one batch of documents.
_CONVERSATION_STEPS, _DOCUMENT_STEPS = 3 * 192 + 2 * 384, 128

_GATED_LAUNCHES = 1.7
"""Launches of a pass with gates, in those of a plain pass: answers are attended to with full attention and windows.

Measured: 137 s of gates for SmolLM2-135M (H200, other jobs beside it; docs/experiment-log.md, 2026-12-01).
"""

_BUDGET_PASSES = 3
"""Passes over each sequence by which the number of heads is found: the dense model and two shares of heads."""

_ANSWER_TOKENS = 16
"""Tokens of an answer at which a top-p is measured."""


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
        forward = fmean(
            shape.forward_flops(length, None if dense else window, share)
            for length in stage.lengths
        )
        # Exact and estimated scores of the drawn queries, and a backward pass of the latter.
        scores = fmean(
            8 * (stage.queries_per_step or length) * length * shape.head_dim * retrieval_heads
            for length in stage.lengths
        )
        return seconds(sequences * forward + stage.steps * scores, sequences + stage.steps)

    stage2 = settings.stage2
    sequences = stage2.steps * (stage2.per_step / processes)
    # The backward pass of a frozen linear layer is one product, that of a trained one two.
    student_passes = 2 + (stage2.lora_rank == 0) + (on_gpu and stage2.gradient_checkpointing)
    logits = 6 * stage2.targets_per_sequence * shape.vocabulary * shape.hidden_size
    flops = fmean(
        shape.forward_flops(length) + student_passes * shape.forward_flops(length, window, share)
        for length in stage2.lengths
    )
    measured = 0.0
    if stage2.steps and stage2.lora_scale is None:
        kinds = len(stage2.mixture) + 1  # prose
        forwards = len(SCALES) * SEQUENCES_PER_KIND * kinds
        forward = fmean(shape.forward_flops(each, window, share) for each in stage2.lengths)
        measured = seconds(forwards * forward, forwards)
    has_refresh = stage2.steps > 0 and stage2.refresh_steps > 0
    calibration = settings.calibration
    # A step of gates: the dense model, the gated one, and its gradients.
    by_gates = calibration.ranking == "gates"
    passes = {"interleaved": 2, "gates": 6}.get(calibration.ranking, 1)
    documents = read = calibration.num_documents * passes
    if by_gates and _reads_prompts_once(shape, settings):
        read = calibration.num_documents
    if calibration.may_exceed_ratio:
        documents += SEQUENCES * _BUDGET_PASSES
        read += SEQUENCES * _BUDGET_PASSES
    # Each value of p in each layer with retrieval heads takes a forward pass of an answer's tokens.
    tried = calibration.top_p_sequences * min(shape.num_layers, retrieval_heads) * (len(TOP_P) + 1)
    by_layer = 0.0
    if tried and settings.attention.layer_top_p is None:
        prompts = calibration.top_p_sequences * shape.forward_flops(calibration.length)
        by_layer = seconds(prompts + 2 * shape.parameters * _ANSWER_TOKENS * tried, tried)
    return StageSeconds(
        writing=_writing_seconds(shape, stage2, device_name),
        calibration=seconds(
            read * shape.forward_flops(calibration.length),
            documents * (_GATED_LAUNCHES if by_gates else 1),
        ),
        stage1=indexers(settings.stage1, dense=True),
        stage2=seconds(sequences * (flops + logits), sequences * (1 + student_passes)) + measured,
        refresh=indexers(settings.refresh, dense=False) if has_refresh else 0.0,
        top_p=by_layer,
    )


def _reads_prompts_once(shape: ModelShape, settings: ConversionSettings) -> bool:
    """True if only the dense model reads the prompts of the gates' sequences (`rtpurbo.calibration.gates`)."""
    length = settings.calibration.length
    is_dense = settings.attention.num_dense_queries(length) == length
    return is_dense and len(shape.full_attention) == shape.num_layers


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
        read = documents * fmean(shape.forward_flops(length) for length in stage2.lengths)
    flops = read + 2 * shape.parameters * tokens
    fixed = 0.0 if device_name == "cpu" else generated * shape.num_layers * STEP_SECONDS
    return flops / throughput(device_name) + fixed


def throughput(device_name: str) -> float:
    """Returns the nominal operations per second of a device."""
    for part, value in THROUGHPUT.items():
        if part in device_name:
            return value
    return THROUGHPUT["cuda"]

"""Plan of a conversion: model, settings, and expected memory and time, before weights are loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rtpurbo.conversion.memory_estimate import peak_bytes
from rtpurbo.conversion.model_shape import ModelShape
from rtpurbo.conversion.time_estimate import StageSeconds, stage_seconds
from rtpurbo.devices import base_dtype, device_name
from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import context_length
from rtpurbo.settings import (
    CalibrationSettings,
    ConversionSettings,
    DistillationSettings,
    IndexerTrainingSettings,
    SequenceSettings,
)

_RIGHT_COLUMN = 13


@dataclass(frozen=True)
class Plan:
    """Settings and expected cost of a conversion.

    Attributes:
        model: name or folder.
        architecture: type of the model, such as "qwen3".
        parameters: number of parameters of the model.
        dtype: dtype of the frozen weights, such as "bfloat16".
        device: name of the device.
        context_length: the model's context, in tokens.
        num_heads: query heads of all converted layers.
        num_kv_heads: KV heads of these layers.
        num_retrieval_heads: number of retrieval heads; None if a threshold determines it.
        settings: all hyper-parameters.
        data: sources of the training texts; None for the built-in text.
        shards: processes among which FSDP divides the model; 1 without FSDP.
        processes: number of processes.
        peak_gib: expected peak memory of each process, in GiB.
        seconds: expected time of each stage, in seconds.
    """

    model: str
    architecture: str
    parameters: int
    dtype: str
    device: str
    context_length: int
    num_heads: int
    num_kv_heads: int
    num_retrieval_heads: int | None
    settings: ConversionSettings
    data: tuple[str, ...] | None
    shards: int
    processes: int
    peak_gib: float
    seconds: StageSeconds

    def lines(self) -> list[tuple[str, str]]:
        """Returns a name and a description of each part of the plan."""
        settings = self.settings.resolved(self.processes)
        stage1, stage2 = settings.stage1, settings.stage2
        rule, calibration = settings.attention, settings.calibration
        lines = [
            ("model", f"{self.model} ({self.architecture})"),
            ("parameters", f"{_count(self.parameters)}, weights in {self.dtype}"),
            ("device", self.device),
            ("context", f"{self.context_length:,} tokens"),
            (
                "window",
                f"{rule.sliding_window:,} tokens, after {rule.num_sink_tokens:,} sinks"
                + f", of which {rule.num_heavy_hitters:,} give way to heavy hitters"
                * (rule.num_heavy_hitters > 0)
                + f"; prompts of up to {rule.dense_prompt_tokens:,} tokens are dense"
                * (rule.dense_prompt_tokens > 0),
            ),
            ("heads", self._heads()),
            (
                "calibration",
                f"{calibration.num_documents} "
                f"{'steps of gates' if calibration.ranking == 'gates' else 'documents'} at "
                f"{calibration.length:,} tokens",
            ),
            ("stage 1", _stage1(stage1)),
            ("", _mixture(stage1)),
        ]
        if stage2.steps:
            trained = f"LoRA of rank {stage2.lora_rank}" if stage2.lora_rank else "all weights"
            lines += [
                (
                    "stage 2",
                    f"{_steps(stage2)} at {_lengths(stage2.lengths)}, {trained}, "
                    f"learning rate {stage2.learning_rate:g}",
                ),
                ("", _mixture(stage2)),
            ]
        else:
            lines.append(("stage 2", "left out"))
        if stage2.steps and stage2.refresh_steps:
            refresh = settings.refresh
            lines.append(("refresh", f"{_steps(refresh)} at {_lengths(refresh.lengths)}"))
        if calibration.top_p_sequences and rule.layer_top_p is None:
            sequences = f"{calibration.top_p_sequences} sequences of {calibration.length:,} tokens"
            lines.append(
                (
                    "top-p",
                    f"by layer, on {sequences}, reading as many tokens as {rule.top_p:g} in all layers",
                )
            )
        data = "documentation of Python (built in)" if self.data is None else ", ".join(self.data)
        memory = f"about {_rounded(self.peak_gib)} GiB expected at the peak"
        return [
            *lines,
            ("data", data),
            ("memory", memory + (f" in each of {self.shards} processes" * (self.shards > 1))),
            ("time", self._time()),
        ]

    def __str__(self) -> str:
        return "\n".join(f"{name:<{_RIGHT_COLUMN}}{text}" for name, text in self.lines())

    def _heads(self) -> str:
        every = f"{self.num_heads:,} query heads ({self.num_kv_heads:,} KV heads)"
        calibration = self.settings.calibration
        if self.num_retrieval_heads is None:
            return f"retrieval heads: a score of {calibration.threshold:g} or more, of {every}"
        unit = ", by KV group" if calibration.granularity == "kv_group" else ""
        text = f"{self.num_retrieval_heads:,} retrieval heads of {every}{unit}"
        if not calibration.may_exceed_ratio:
            return text
        return f"{text}; more if answers diverge by more than {calibration.max_divergence:g} nats"

    def _time(self) -> str:
        stages = {
            "writing": self.seconds.writing,
            "calibration": self.seconds.calibration,
            "stage 1": self.seconds.stage1,
            "stage 2": self.seconds.stage2,
            "refresh": self.seconds.refresh,
            "top-p": self.seconds.top_p,
        }
        parts = ", ".join(
            f"{name} {_rounded(seconds / 60)}" for name, seconds in stages.items() if seconds
        )
        return f"about {_rounded(sum(stages.values()) / 60)} minutes expected: {parts}"


def make_plan(
    model: str,
    config: Any,
    settings: ConversionSettings,
    *,
    data: Sequence[str] | None = None,
    device: torch.device,
    dtype: str = "auto",
    shards: int = 1,
    processes: int = 1,
) -> Plan:
    """Plans a conversion from the model's configuration, without its weights.

    Args:
        model: name or folder to show.
        config: text configuration of the model.
        settings: settings with lengths that fit the model.
        data: sources of the training texts; None for the built-in text.
        device: device of the conversion.
        dtype: dtype of the frozen weights; `auto` is the checkpoint's on a GPU, float32 on a CPU or if
            the configuration has none.
        shards: processes among which FSDP divides the model.
        processes: number of processes, one sequence of a step for each where settings leave it open.

    Raises:
        RTPurboError: more retrieval heads are requested than the model has.
    """
    shape = ModelShape.of(config)
    asked = _heads_asked_for(settings.calibration, shape.num_heads)
    retrieval_heads = shape.num_heads if asked is None else asked
    resolved = _dtype(config, dtype, device)
    name, on_gpu = device_name(device), device.type != "cpu"
    memory = peak_bytes(
        shape,
        settings,
        retrieval_heads=retrieval_heads,
        itemsize=resolved.itemsize,
        on_gpu=on_gpu,
        shards=shards,
    )
    return Plan(
        model=model,
        architecture=config.model_type,
        parameters=shape.parameters,
        dtype=str(resolved).removeprefix("torch."),
        device=name,
        context_length=context_length(config),
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        num_retrieval_heads=asked,
        settings=settings,
        data=None if data is None else tuple(data),
        shards=shards,
        peak_gib=memory / 2**30,
        processes=processes,
        seconds=stage_seconds(
            shape,
            settings.resolved(processes),
            retrieval_heads=retrieval_heads,
            device_name=name,
            processes=processes,
        ),
    )


def _heads_asked_for(settings: CalibrationSettings, num_heads: int) -> int | None:
    if settings.threshold is not None:
        return None
    if settings.count is None:
        return math.ceil(settings.ratio * num_heads)
    if settings.count > num_heads:
        raise RTPurboError(
            f"{settings.count} retrieval heads were asked for, but the model has {num_heads} query "
            "heads in layers with full attention: lower --count."
        )
    return settings.count


def _dtype(config: Any, name: str, device: torch.device) -> torch.dtype:
    chosen = base_dtype(name, device)
    if chosen != "auto":
        return chosen
    stored = getattr(config, "dtype", None) or torch.float32
    return stored if isinstance(stored, torch.dtype) else getattr(torch, str(stored))


def _count(parameters: int) -> str:
    """Formats a number of parameters, such as "8.2 billion"."""
    if parameters >= 1e9:
        return f"{parameters / 1e9:.1f} billion"
    return f"{parameters / 1e6:.3g} million"


def _steps(stage: IndexerTrainingSettings | DistillationSettings) -> str:
    """Formats the number of steps, with the sequences of each if there are several."""
    sequences = f" of {stage.per_step} sequences" if stage.per_step > 1 else ""
    return f"{stage.steps} steps{sequences}"


def _stage1(stage: IndexerTrainingSettings) -> str:
    """Formats the steps of stage 1, or the sequences that initialise the indexers when no steps follow."""
    work = (
        _steps(stage)
        if stage.steps
        else f"no training, {stage.init_sequences} sequences for initialisation"
    )
    return f"{work} at {_lengths(stage.lengths)}"


def _mixture(stage: SequenceSettings) -> str:
    """Formats the share of each kind of sequence, such as "needles 50 %, prose 50 %"."""
    shares = {**stage.mixture, "prose": 1 - sum(stage.mixture.values())}
    return ", ".join(
        f"{kind} {100 * share:.3g} %" for kind, share in shares.items() if share > 1e-9
    )


def _lengths(lengths: Sequence[int]) -> str:
    """Formats distinct lengths in ascending order, with their unit."""
    *shorter, longest = (f"{length:,}" for length in sorted(set(lengths)))
    return f"{', '.join(shorter)} and {longest} tokens" if shorter else f"{longest} tokens"


def _rounded(value: float) -> str:
    """Formats a number with two significant digits, the precision of the estimates."""
    if value >= 10:
        return f"{float(f'{value:.2g}'):,.0f}"
    return f"{value:.1f}" if value >= 0.1 else "0.1"

"""From a dense model to an artifact: calibrate, stage 1, stage 2, refresh; each step resumable and usable alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rtpurbo.calibration.calibrate import calibrate, read_calibration
from rtpurbo.config import HeadMap
from rtpurbo.data.texts import load_texts
from rtpurbo.devices import base_dtype, resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.files import write_json_atomically
from rtpurbo.interruption import stopping_cleanly
from rtpurbo.job import Job
from rtpurbo.models.artifact import ArtifactConfig, find_artifact, load_base, read_indexers
from rtpurbo.models.base import BaseModel, load_base_model
from rtpurbo.models.sparsify import load_indexers, sparsify
from rtpurbo.settings import (
    ConversionSettings,
    Progress,
    change_settings,
    no_progress,
    preset_settings,
    recorded_changes,
    settings_for_context,
)


@stopping_cleanly()
def convert(
    model: str | None,
    output_dir: str | Path,
    *,
    settings: ConversionSettings | None = None,
    changes: Mapping[str, Any] | None = None,
    preset: str = "auto",
    data: Sequence[str] | None = None,
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
    parallel: str = "data",
    report_to: Sequence[str] = (),
    dtype: str = "auto",
) -> Path:
    """Makes a sparse model of a dense one: calibration, stage 1, stage 2 and a refresh of the indexers.

    Args:
        model: name on the Hugging Face Hub, folder, or None for the embedded default.
        output_dir: where the artifact goes; written whole or not at all. Until then the work lives beside it.
        settings: all hyper-parameters; the preset's if None.
        changes: fields to change on them, as `rtpurbo.settings.change_settings` takes them.
        preset: `quick` (two CPU cores), `standard` (a GPU), or `auto`, which takes what suits the device.
        data: files or `hf:NAME` to train on; Python's own documentation if None.
        device: `auto`, `cpu`, `cuda`, ...
        resume: continue an interrupted conversion into the same folder.
        force: replace an existing output folder, or start an interrupted conversion anew.
        progress: told after each step.
        parallel: how the processes that `torchrun` started share the work: `data`, each with the whole model and
            its part of the texts, or `fsdp`, each with a part of the weights too.
        report_to: experiment trackers to show figures to, such as `tensorboard`.
        dtype: of the frozen base model: `float32`, `bfloat16`, `float16`, or `auto`, the checkpoint's on a GPU and
            float32 on a CPU. What is trained is float32.

    Returns:
        The artifact's folder.

    Raises:
        RTPurboError: anything about model, data, folder or settings that one sentence can say.
        StoppedBySignalError: SIGTERM or Ctrl-C, after a checkpoint was saved.
    """
    with _job(
        output_dir,
        data,
        device,
        resume,
        force,
        progress,
        settings,
        changes,
        parallel,
        report_to,
        dtype,
    ) as job:
        base = load_base_model(model, device=job.device, dtype=job.dtype, processes=job.processes)
        settings = choose_settings(base, job.device, settings, preset, changes)
        job.open(base, settings, "convert")
        config = job.calibrate(base)
        sparsify(base.model, config)
        job.stage1(base)
        job.stage2(base)
        return job.finish(base)


def calibrate_model(
    model: str | None,
    output: str | Path,
    *,
    settings: ConversionSettings | None = None,
    changes: Mapping[str, Any] | None = None,
    data: Sequence[str] | None = None,
    device: str = "auto",
    force: bool = False,
    progress: Progress = no_progress,
    dtype: str = "auto",
) -> HeadMap:
    """Finds the retrieval heads and writes the head map, its scores and their stability as JSON.

    Raises:
        RTPurboError: as `convert`, and if the file exists and `force` is false.
    """
    output = Path(output)
    if output.exists() and not force:
        raise RTPurboError(
            f"{output} exists already; choose another file or pass --force to replace it."
        )
    place = resolve_device(device)
    base = load_base_model(model, device=place, dtype=base_dtype(dtype, place))
    settings = choose_settings(base, place, settings, "auto", changes)
    found = calibrate(
        base.model,
        base.tokenizer,
        load_texts(data, "train"),
        settings.calibration,
        seed=settings.seed,
        progress=progress,
    )
    write_json_atomically(output, found.to_dict())
    return found.head_map


@stopping_cleanly()
def train_indexer_artifact(
    model: str | None,
    head_map: str | Path,
    output_dir: str | Path,
    *,
    settings: ConversionSettings | None = None,
    changes: Mapping[str, Any] | None = None,
    data: Sequence[str] | None = None,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
    progress: Progress = no_progress,
    parallel: str = "data",
    report_to: Sequence[str] = (),
    dtype: str = "auto",
) -> Path:
    """Stage 1 alone: an artifact without stage 2 from a head map that `calibrate_model` wrote."""
    found = read_calibration(Path(head_map))
    with _job(
        output_dir,
        data,
        device,
        resume,
        force,
        progress,
        settings,
        changes,
        parallel,
        report_to,
        dtype,
    ) as job:
        base = load_base_model(model, device=job.device, dtype=job.dtype, processes=job.processes)
        settings = choose_settings(base, job.device, settings, "auto", changes)
        if found.settings is not None:
            settings = replace(settings, calibration=found.settings)
        job.open(base, settings, "train-indexer")
        job.keep_calibration(found)
        sparsify(base.model, job.config(base, found.head_map))
        job.stage1(base)
        return job.finish(base)


@stopping_cleanly()
def distill_artifact(
    artifact: str | Path,
    output_dir: str | Path,
    *,
    settings: ConversionSettings | None = None,
    changes: Mapping[str, Any] | None = None,
    data: Sequence[str] | None = None,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
    progress: Progress = no_progress,
    parallel: str = "data",
    report_to: Sequence[str] = (),
    dtype: str = "auto",
) -> Path:
    """Stage 2 alone: adds it, and the refresh, to an artifact that has a trained indexer.

    The refresh goes on as stage 1 went; `changes` count for it too, and `settings` in place of that.
    """
    folder = find_artifact(artifact)
    before = ArtifactConfig.read(folder)
    indexers = read_indexers(folder)
    if settings is None:
        changes = recorded_changes(before.settings, "calibration", "stage1") | dict(changes or {})
    with _job(
        output_dir,
        data,
        device,
        resume,
        force,
        progress,
        settings,
        changes,
        parallel,
        report_to,
        dtype,
    ) as job:
        base = load_base(folder, device=job.device, dtype=job.dtype, processes=job.processes)
        settings = choose_settings(base, job.device, settings, "auto", changes)
        settings = replace(
            settings, attention=before.config.attention, indexer=before.config.indexer
        )
        job.open(base, settings, "distill")
        sparsify(base.model, before.config)
        load_indexers(base.model, indexers)
        job.keep_stage1(folder, before, indexers)
        job.stage2(base)
        return job.finish(base)


def _job(
    output_dir: str | Path,
    data: Sequence[str] | None,
    device: str,
    resume: bool,
    force: bool,
    progress: Progress,
    settings: ConversionSettings | None,
    changes: Mapping[str, Any] | None,
    parallel: str,
    report_to: Sequence[str],
    dtype: str,
) -> Job:
    # How texts are read is known before the model is, on which other settings depend.
    about_texts = {
        name: value
        for name, value in (changes or {}).items()
        if name == "seed" or name.startswith("stream.")
    }
    early = change_settings(settings or ConversionSettings(), about_texts)
    return Job(
        output_dir,
        data,
        device,
        resume=resume,
        force=force,
        progress=progress,
        stream=early.stream,
        seed=early.seed,
        parallel=parallel,
        report_to=report_to,
        dtype=dtype,
    )


def choose_settings(
    base: BaseModel,
    device: torch.device,
    settings: ConversionSettings | None,
    preset: str,
    changes: Mapping[str, Any] | None,
) -> ConversionSettings:
    """The settings given, or the preset that was asked for or suits the device; and the changes to them."""
    context = base.model.config.max_position_embeddings
    if settings is None:
        if preset == "auto":
            preset = "quick" if device.type == "cpu" else "standard"
        settings = preset_settings(preset, context)
    return change_settings(settings_for_context(settings, context), changes or {})

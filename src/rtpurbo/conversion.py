"""From a dense model to an artifact: calibrate, stage 1, stage 2, refresh; each step resumable and usable alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rtpurbo.calibration.calibrate import calibrate
from rtpurbo.config import HeadMap
from rtpurbo.data.texts import load_texts
from rtpurbo.devices import resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.files import save_tensors_atomically, write_json_atomically
from rtpurbo.job import Job, read_head_map
from rtpurbo.models.artifact import (
    INDEXER_FILE,
    ArtifactConfig,
    find_artifact,
    load_base,
    read_tensors,
)
from rtpurbo.models.base import BaseModel, load_base_model
from rtpurbo.models.sparsify import load_indexers, sparsify
from rtpurbo.settings import (
    ConversionSettings,
    Progress,
    change_settings,
    no_progress,
    preset_settings,
    settings_for_context,
)


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

    Returns:
        The artifact's folder.

    Raises:
        RTPurboError: anything about model, data, folder or settings that one sentence can say.
    """
    job = Job(output_dir, data, device, resume=resume, force=force, progress=progress)
    base = load_base_model(model, device=job.device)
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
    base = load_base_model(model, device=place)
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
) -> Path:
    """Stage 1 alone: an artifact without stage 2 from a head map that `calibrate_model` wrote."""
    job = Job(output_dir, data, device, resume=resume, force=force, progress=progress)
    found = read_head_map(Path(head_map))
    base = load_base_model(model, device=job.device)
    settings = choose_settings(base, job.device, settings, "auto", changes)
    job.open(base, settings, "train-indexer")
    sparsify(base.model, job.config(base, found))
    job.stage1(base)
    return job.finish(base)


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
) -> Path:
    """Stage 2 alone: adds it, and the refresh, to an artifact that has a trained indexer."""
    job = Job(output_dir, data, device, resume=resume, force=force, progress=progress)
    folder = find_artifact(artifact)
    config = ArtifactConfig.read(folder).config
    indexers = read_tensors(folder / INDEXER_FILE)
    base = load_base(folder, device=job.device)
    settings = choose_settings(base, job.device, settings, "auto", changes)
    settings = replace(settings, attention=config.attention, indexer=config.indexer)
    job.open(base, settings, "distill")
    sparsify(base.model, config)
    load_indexers(base.model, indexers)
    save_tensors_atomically(job.work / "indexer_stage1.safetensors", indexers)
    job.stage2(base)
    return job.finish(base)


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

"""From a dense model to an artifact: calibrate, stage 1, stage 2, refresh; each step resumable and usable alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rtpurbo.calibration.calibrate import read_calibration
from rtpurbo.config import AttentionRule, HeadMap
from rtpurbo.data.texts import load_texts
from rtpurbo.defaults import default_rule, default_settings, resolve_effort
from rtpurbo.devices import base_dtype, resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.files import write_json_atomically
from rtpurbo.job import Job, calibrate_base
from rtpurbo.lengths import check_lengths
from rtpurbo.models.architecture import context_length, convertible_shapes
from rtpurbo.models.artifact import load_base, read_indexers
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.models.artifact_folder import check_is_dense, find_artifact
from rtpurbo.models.base import DEFAULT_MODEL, load_base_model, read_config
from rtpurbo.models.sparse_layers import load_indexers
from rtpurbo.models.sparsify import sparsify
from rtpurbo.plan import Plan, make_plan
from rtpurbo.settings import (
    ConversionSettings,
    DistillationSettings,
    Progress,
    change_settings,
    no_progress,
    recorded_changes,
)
from rtpurbo.training.student import check_trainable


def ignore_plan(plan: Plan) -> None:
    """The default of `on_plan`: does nothing."""


def convert(
    model: str | None,
    output_dir: str | Path,
    *,
    settings: ConversionSettings | None = None,
    changes: Mapping[str, Any] | None = None,
    effort: str = "auto",
    max_length: int | None = None,
    data: Sequence[str] | None = None,
    device: str = "auto",
    resume: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
    parallel: str = "data",
    report_to: Sequence[str] = (),
    dtype: str = "auto",
    on_plan: Callable[[Plan], None] = ignore_plan,
) -> Path:
    """Makes a sparse model of a dense one: calibration, stage 1, stage 2 and a refresh of the indexers.

    Args:
        model: name on the Hugging Face Hub, folder, or None for the embedded default.
        output_dir: where the artifact goes; written whole or not at all. Until then the work lives beside it.
        settings: all hyper-parameters; those of `effort` if None.
        changes: fields to change on them, as `rtpurbo.settings.change_settings` takes them.
        effort: `quick` (two CPU cores), `standard` (a GPU), `thorough` (more steps, longer sequences), or
            `auto`, which takes `quick` on a CPU and `standard` on a GPU.
        max_length: tokens of the longest training sequence; the effort's if None.
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
        on_plan: receives the plan before texts and weights are read.

    Returns:
        The artifact's folder.

    Raises:
        RTPurboError: anything about model, data, folder or settings that one sentence can say.
        StoppedBySignalError: SIGTERM or Ctrl-C within `rtpurbo.interruption.stopping_cleanly`, after a
            checkpoint was saved. Without it, signals do what they do elsewhere; `resume` continues from the
            latest checkpoint.
    """
    with Job(
        output_dir,
        data,
        device,
        resume=resume,
        force=force,
        progress=progress,
        parallel=parallel,
        report_to=report_to,
        dtype=dtype,
    ) as job:
        plan = plan_conversion(
            model,
            settings=settings,
            changes=changes,
            effort=effort,
            max_length=max_length,
            data=data,
            device=device,
            dtype=dtype,
            shards=job.processes.count if job.processes.shard_weights else 1,
            processes=job.processes.count,
        )
        on_plan(plan)
        job.read_texts(plan.settings)
        base = load_base_model(
            model,
            device=job.device,
            dtype=job.dtype,
            progress=job.progress,
            processes=job.processes,
        )
        job.open(base, plan.settings, "convert")
        job.write_pools(base, job.settings.stage1, job.settings.stage2, job.settings.refresh)
        config = job.calibrate(base)
        sparsify(base.model, config)
        job.stage1(base)
        job.stage2(base)
        return job.finish(base)


def plan_conversion(
    model: str | None,
    *,
    settings: ConversionSettings | None = None,
    changes: Mapping[str, Any] | None = None,
    effort: str = "auto",
    max_length: int | None = None,
    data: Sequence[str] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    shards: int = 1,
    processes: int = 1,
) -> Plan:
    """Plans a conversion and checks its settings; reads the model's configuration alone.

    Args:
        model: as `convert` takes it.
        settings: as `convert` takes them.
        changes: as `convert` takes them.
        effort: as `convert` takes it.
        max_length: as `convert` takes it.
        data: as `convert` takes it; the texts are not read.
        device: as `convert` takes it.
        dtype: of the frozen weights, as `rtpurbo.plan.make_plan` takes it.
        shards: processes that share the weights, as `make_plan` takes it.
        processes: of `torchrun`, as `make_plan` takes it.

    Raises:
        RTPurboError: as `convert`, about model, device or settings.
    """
    place = resolve_device(device)
    config = _dense_config(model)
    settings = choose_settings(config, place, settings, effort, max_length, changes)
    _check_has_effect(changes or {}, settings)
    check_lengths(settings, context_length(config))
    plan = make_plan(
        model or DEFAULT_MODEL,
        config,
        settings,
        data=data,
        device=place,
        dtype=dtype,
        shards=shards,
        processes=processes,
    )
    check_trainable(getattr(torch, plan.dtype), settings.stage2)
    return plan


def calibrate(
    model: str | None,
    output: str | Path,
    *,
    settings: ConversionSettings | None = None,
    changes: Mapping[str, Any] | None = None,
    effort: str = "auto",
    max_length: int | None = None,
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
    config = _dense_config(model)
    settings = choose_settings(config, place, settings, effort, max_length, changes)
    check_lengths(settings, context_length(config), ["calibration"])
    base = load_base_model(model, device=place, dtype=base_dtype(dtype, place), progress=progress)
    found = calibrate_base(base, load_texts(data, "train"), settings, progress)
    write_json_atomically(output, found.to_dict())
    return found.head_map


def train_indexer(
    model: str | None,
    head_map: str | Path,
    output_dir: str | Path,
    *,
    settings: ConversionSettings | None = None,
    changes: Mapping[str, Any] | None = None,
    effort: str = "auto",
    max_length: int | None = None,
    data: Sequence[str] | None = None,
    device: str = "auto",
    force: bool = False,
    resume: bool = False,
    progress: Progress = no_progress,
    parallel: str = "data",
    report_to: Sequence[str] = (),
    dtype: str = "auto",
) -> Path:
    """Stage 1 alone: an artifact without stage 2 from a head map that `calibrate` wrote."""
    found = read_calibration(Path(head_map))
    with Job(
        output_dir,
        data,
        device,
        resume=resume,
        force=force,
        progress=progress,
        parallel=parallel,
        report_to=report_to,
        dtype=dtype,
    ) as job:
        config = _dense_config(model)
        settings = choose_settings(config, job.device, settings, effort, max_length, changes)
        if found.settings is not None:
            settings = replace(settings, calibration=found.settings)
        check_lengths(settings, context_length(config), ["stage1"])
        job.read_texts(settings)
        base = load_base_model(
            model,
            device=job.device,
            dtype=job.dtype,
            progress=job.progress,
            processes=job.processes,
        )
        job.open(base, settings, "train-indexer", ["stage1"])
        job.keep_calibration(found)
        job.write_pools(base, job.settings.stage1)
        sparsify(base.model, job.config(found.head_map))
        job.stage1(base)
        return job.finish(base)


def distill(
    artifact: str | Path,
    output_dir: str | Path,
    *,
    settings: ConversionSettings | None = None,
    changes: Mapping[str, Any] | None = None,
    effort: str = "auto",
    max_length: int | None = None,
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

    The refresh uses the recorded settings of stage 1, with `changes`; or those in `settings`.
    """
    folder = find_artifact(artifact)
    before = ArtifactConfig.read(folder)
    indexers = read_indexers(folder)
    by_effort, changes = settings is None, dict(changes or {})
    if by_effort:
        changes = recorded_changes(before.settings, "calibration", "stage1") | changes
    revision = before.base.revision if before.base.source == "hub" else None
    with Job(
        output_dir,
        data,
        device,
        resume=resume,
        force=force,
        progress=progress,
        parallel=parallel,
        report_to=report_to,
        dtype=dtype,
    ) as job:
        config = read_config(before.base.name, revision=revision)
        rule = before.config.attention
        settings = choose_settings(config, job.device, settings, effort, max_length, changes, rule)
        settings = replace(settings, attention=rule, indexer=before.config.indexer)
        if by_effort and "stage2.steps" not in changes:
            settings = with_stage2(settings)
        check_lengths(settings, context_length(config), ["stage1", "stage2"])
        job.read_texts(settings)
        base = load_base(folder, device=job.device, dtype=job.dtype, processes=job.processes)
        job.open(base, settings, "distill", ["stage1", "stage2"])
        job.write_pools(base, job.settings.stage2, job.settings.refresh)
        sparsify(base.model, before.config)
        load_indexers(base.model, indexers)
        job.keep_stage1(folder, before, indexers)
        job.stage2(base)
        return job.finish(base)


def with_stage2(settings: ConversionSettings) -> ConversionSettings:
    """Settings of an effort for stage 2 alone, which has steps even if the effort leaves it out of a conversion."""
    steps = settings.stage2.steps or DistillationSettings().steps
    return replace(settings, stage2=replace(settings.stage2, steps=steps))


def _check_has_effect(changes: Mapping[str, Any], settings: ConversionSettings) -> None:
    """Refuses changes to a stage 2 that is left out."""
    of_stage2 = [name for name in changes if name.startswith("stage2.") and name != "stage2.steps"]
    if of_stage2 and not settings.stage2.steps:
        raise RTPurboError(
            f"{of_stage2[0]} has no effect, because stage 2 is left out: add --stage2-steps 100, choose "
            "--effort thorough, or leave the setting out."
        )


def _dense_config(model: str | None) -> Any:
    """The text configuration of the model to convert; refuses an artifact in its place."""
    if model is not None:
        check_is_dense(model)
    return read_config(model)


def choose_settings(
    config: Any,
    device: torch.device,
    settings: ConversionSettings | None,
    effort: str,
    max_length: int | None,
    changes: Mapping[str, Any] | None,
    rule: AttentionRule | None = None,
) -> ConversionSettings:
    """Returns the settings given, or those of an effort, with changes made to them.

    Args:
        config: text configuration of the model.
        device: where to work.
        settings: that were given.
        effort: as `convert` takes it.
        max_length: as `convert` takes it.
        changes: as `convert` takes them.
        rule: of an artifact that exists already; lengths that are left out follow its window.

    Raises:
        RTPurboError: there is no such effort or setting, or a value is of the wrong type or out of range.
    """
    changes = changes or {}
    resolved = resolve_effort(effort, device.type)
    if settings is None:
        context = context_length(config)
        if rule is None:
            # Lengths follow the window, so it is changed before they are chosen.
            rule = default_rule(resolved, context)
            ours = {name: changes[name] for name in changes if name.startswith("attention.")}
            rule = change_settings(ConversionSettings(attention=rule), ours).attention
        head_dim = max(shape.head_dim for shape in convertible_shapes(config).values())
        settings = default_settings(
            resolved, context, head_dim=head_dim, max_length=max_length, rule=rule
        )
    elif max_length is not None:
        raise RTPurboError("max_length has no effect on given settings: change their lengths.")
    return change_settings(settings, changes)

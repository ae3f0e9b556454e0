"""From a dense model to an artifact: calibrate, stage 1, stage 2, refresh, top-p by layer; each step resumable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rtpurbo.calibration.calibrate import read_calibration
from rtpurbo.config import HeadMap
from rtpurbo.conversion.job import Job, calibrate_base
from rtpurbo.conversion.options import (
    JobOptions,
    SettingsOptions,
    check_names,
    choose_settings,
    settings_options,
)
from rtpurbo.conversion.plan import Plan, make_plan
from rtpurbo.data.texts import load_texts
from rtpurbo.devices import base_dtype, resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.files import write_json_atomically
from rtpurbo.lengths import check_lengths
from rtpurbo.models.architecture import context_length
from rtpurbo.models.artifact import load_base, read_indexers
from rtpurbo.models.artifact_config import ArtifactConfig, check_is_dense, find_artifact
from rtpurbo.models.base import DEFAULT_MODEL, BaseModel, load_base_model, read_config
from rtpurbo.models.sparse_layers import load_indexers
from rtpurbo.models.sparsify import sparsify
from rtpurbo.settings import (
    ConversionSettings,
    DistillationSettings,
    Progress,
    no_progress,
    recorded_changes,
)
from rtpurbo.training.student import check_trainable

if TYPE_CHECKING:
    from typing_extensions import Unpack


def ignore_plan(plan: Plan) -> None:
    """The default of `on_plan`: does nothing."""


def convert(
    model: str | None,
    output_dir: str | Path,
    *,
    on_plan: Callable[[Plan], None] = ignore_plan,
    **options: Unpack[JobOptions],
) -> Path:
    """Converts a dense model to a sparse one: calibration, stage 1, stage 2 with a refresh, top-p by layer.

    Args:
        model: name on the Hugging Face Hub, folder, or None for the embedded default.
        output_dir: folder of the artifact, written whole or not at all. Files of unfinished work are in a
            folder of the same name with `.work` appended.
        on_plan: receives the plan before texts and weights are read.
        **options: see `rtpurbo.conversion.options.JobOptions`.

    Returns:
        The artifact's folder.

    Raises:
        RTPurboError: an error in model, data, folder or settings that one sentence can describe.
        StoppedBySignalError: SIGTERM or Ctrl-C within `rtpurbo.interruption.stopping_cleanly`, after a
            checkpoint was saved. Without it, signals have their usual effect; `resume` continues from the
            latest checkpoint.
    """
    with Job(output_dir, **options) as job:
        plan = plan_conversion(
            model,
            shards=job.processes.count if job.processes.shard_weights else 1,
            processes=job.processes.count,
            **settings_options(options),
        )
        on_plan(plan)
        base = job.open(_loading(model), plan.settings, "convert")
        job.write_pools(base, job.settings.stage1, job.settings.stage2, job.settings.refresh)
        config = job.calibrate(base)
        sparsify(base.model, config)
        job.stage1(base)
        job.stage2(base)
        job.top_p(base)
        return job.finish(base)


def plan_conversion(
    model: str | None, *, shards: int = 1, processes: int = 1, **options: Unpack[SettingsOptions]
) -> Plan:
    """Plans a conversion and checks its settings; reads the model's configuration, but neither texts nor weights.

    Args:
        model: as `convert` takes it.
        shards: processes that share the weights, as `make_plan` takes it.
        processes: of `torchrun`, as `make_plan` takes it.
        **options: see `rtpurbo.conversion.options.SettingsOptions`.

    Raises:
        RTPurboError: as `convert`, about model, device or settings.
    """
    check_names(options, SettingsOptions)
    place = resolve_device(options.get("device", "auto"))
    config = _dense_config(model)
    settings = choose_settings(config, place, options)
    _check_has_effect(options.get("changes") or {}, settings)
    check_lengths(settings, context_length(config))
    plan = make_plan(
        model or DEFAULT_MODEL,
        config,
        settings,
        data=options.get("data"),
        device=place,
        dtype=options.get("dtype", "auto"),
        shards=shards,
        processes=processes,
    )
    check_trainable(getattr(torch, plan.dtype), settings.stage2)
    return plan


def calibrate(
    model: str | None,
    output: str | Path,
    *,
    force: bool = False,
    progress: Progress = no_progress,
    **options: Unpack[SettingsOptions],
) -> HeadMap:
    """Finds the retrieval heads and writes the head map, its scores and their stability as JSON.

    Args:
        model: as `convert` takes it.
        output: file to write.
        force: replace an existing file.
        progress: called after each step.
        **options: see `rtpurbo.conversion.options.SettingsOptions`.

    Raises:
        RTPurboError: as `convert`, and if the file exists and `force` is false.
    """
    check_names(options, SettingsOptions)
    output = Path(output)
    if output.exists() and not force:
        raise RTPurboError(
            f"{output} exists already; choose another file or pass --force to replace it."
        )
    place = resolve_device(options.get("device", "auto"))
    config = _dense_config(model)
    settings = choose_settings(config, place, options)
    check_lengths(settings, context_length(config), ["calibration"])
    dtype = base_dtype(options.get("dtype", "auto"), place)
    base = load_base_model(model, device=place, dtype=dtype, progress=progress)
    found = calibrate_base(base, load_texts(options.get("data"), "train"), settings, progress)
    write_json_atomically(output, found.to_dict())
    return found.head_map


def train_indexer(
    model: str | None,
    head_map: str | Path,
    output_dir: str | Path,
    **options: Unpack[JobOptions],
) -> Path:
    """Stage 1 and top-p by layer alone: an artifact without stage 2 from a head map that `calibrate` wrote."""
    found = read_calibration(Path(head_map))
    with Job(output_dir, **options) as job:
        config = _dense_config(model)
        settings = job.choose_settings(config)
        if found.settings is not None:
            settings = replace(settings, calibration=found.settings)
        check_lengths(settings, context_length(config), ["stage1"])
        base = job.open(_loading(model), settings, "train-indexer", ["stage1"])
        job.store_calibration(found)
        job.write_pools(base, job.settings.stage1)
        sparsify(base.model, job.config(found.head_map))
        job.stage1(base)
        job.top_p(base)
        return job.finish(base)


def distill(artifact: str | Path, output_dir: str | Path, **options: Unpack[JobOptions]) -> Path:
    """Stage 2 alone: adds it, and the refresh, to an artifact that has a trained indexer.

    The refresh uses the recorded settings of stage 1, with `changes`; or those in `settings`.
    """
    folder = find_artifact(artifact)
    before = ArtifactConfig.read(folder)
    if "top_p" in before.figures:  # measured before stage 2, and again after it
        before = replace(before, config=before.config.with_rule(layer_top_p=None))
    indexers = read_indexers(folder)
    changes = dict(options.get("changes") or {})
    by_effort = options.get("settings") is None
    if by_effort:
        changes = recorded_changes(before.settings, "calibration", "stage1") | changes
    revision = before.base.revision if before.base.source == "hub" else None
    options["changes"] = changes
    with Job(output_dir, **options) as job:
        config = read_config(before.base.name, revision=revision)
        rule = before.config.attention
        settings = job.choose_settings(config, rule)
        settings = replace(settings, attention=rule, indexer=before.config.indexer)
        if by_effort and "stage2.steps" not in changes:
            settings = with_stage2(settings)
        check_lengths(settings, context_length(config), ["stage1", "stage2"])

        def load(job: Job) -> BaseModel:
            return load_base(folder, device=job.device, dtype=job.dtype, processes=job.processes)

        base = job.open(load, settings, "distill", ["stage1", "stage2"])
        job.write_pools(base, job.settings.stage2, job.settings.refresh)
        sparsify(base.model, before.config)
        load_indexers(base.model, indexers)
        job.copy_stage1(folder, before, indexers)
        job.stage2(base)
        job.top_p(base)
        return job.finish(base)


def _loading(model: str | None) -> Callable[[Job], BaseModel]:
    """Returns a function that loads a base model for a job."""
    return lambda job: load_base_model(
        model,
        device=job.device,
        dtype=job.dtype,
        progress=job.progress,
        processes=job.processes,
    )


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

"""From a dense model to an artifact: calibrate, stage 1, stage 2, refresh; each step resumable and usable alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtpurbo.calibration.calibrate import calibrate
from rtpurbo.config import AttentionRule, HeadMap, RTPurboConfig, default_sliding_window, head_map_from_dict
from rtpurbo.data.texts import load_texts
from rtpurbo.devices import resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.files import check_output_folder, save_tensors_atomically, whole_folder, write_json_atomically
from rtpurbo.models.artifact import (
    ADAPTER_FOLDER,
    CARD_FILE,
    FULL_WEIGHTS_FILE,
    INDEXER_FILE,
    LOG_FILE,
    ArtifactConfig,
    apply_stage2,
    check_base,
    find_artifact,
    read_tensors,
    save_artifact,
)
from rtpurbo.models.base import BaseModel, load_base_model
from rtpurbo.models.families import family_of
from rtpurbo.models.sparsify import indexer_weights, load_indexers, sparsify
from rtpurbo.reporting.card import model_card
from rtpurbo.settings import ConversionSettings, Progress, change_settings, no_progress, preset_settings
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.stage1 import train_indexers
from rtpurbo.training.stage2 import distill
from rtpurbo.version import __version__

PLAN_FILE = "plan.json"
HEAD_MAP_FILE = "head_map.json"


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
    family_of(base.model.config)
    settings = change_settings(settings or job.default_settings(preset, base), changes or {})
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
        raise RTPurboError(f"{output} exists already; choose another file or pass --force to replace it.")
    base = load_base_model(model, device=resolve_device(device))
    settings = change_settings(settings or preset_settings("standard", base.model.config.max_position_embeddings), changes or {})
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
    settings = change_settings(settings or job.default_settings("auto", base), changes or {})
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
    source = ArtifactConfig.read(folder)
    indexers = read_tensors(folder / INDEXER_FILE)
    base = load_base_model(source.base.name, device=job.device)
    check_base(base.model, source.base, str(artifact))
    settings = change_settings(settings or job.default_settings("auto", base), changes or {})
    job.open(base, settings, "distill")
    sparsify(base.model, source.config)
    load_indexers(base.model, indexers)
    save_tensors_atomically(job.work / "indexer_stage1.safetensors", indexers)
    job.stage2(base)
    return job.finish(base)


class Job:
    """One conversion: its work folder, and the stages that read and write it.

    Every stage leaves one file when it is done and is skipped if the file is there; while it runs it keeps a checkpoint.

    Args:
        output_dir: where the artifact goes.
        data: training texts.
        device: where to work.
        resume: continue what an interrupted job left.
        force: replace what exists.
        progress: told after each step.
    """

    def __init__(
        self,
        output_dir: str | Path,
        data: Sequence[str] | None,
        device: str,
        *,
        resume: bool,
        force: bool,
        progress: Progress,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.work = self.output_dir.absolute().with_name(self.output_dir.name + ".work")
        self.resume, self.force, self.progress = resume, force, progress
        self.device = resolve_device(device)
        self.data = list(data) if data else None
        check_output_folder(self.output_dir, force)
        if self.work.exists() and not (resume or force):
            raise RTPurboError(
                f"a conversion into {self.output_dir} was interrupted: pass --resume to continue it, "
                "or --force to start anew."
            )
        self.train_text = load_texts(self.data, "train")
        self.held_out = load_texts(self.data, "heldout")
        self.log = TrainingLog(self.work / LOG_FILE)
        self.settings = ConversionSettings()

    def default_settings(self, preset: str, base: BaseModel) -> ConversionSettings:
        """The preset that suits the device, or the one asked for."""
        if preset == "auto":
            preset = "quick" if self.device.type == "cpu" else "standard"
        return preset_settings(preset, base.model.config.max_position_embeddings)

    def open(self, base: BaseModel, settings: ConversionSettings, command: str) -> None:
        """Makes the work folder, or checks that the one to resume was made for the same job."""
        self.settings = settings
        plan = json.loads(
            json.dumps(
                {
                    "command": command,
                    "library_version": __version__,
                    "base_model": vars(base.reference),
                    "data": self.data,
                    "settings": settings.to_dict(),
                }
            )
        )
        path = self.work / PLAN_FILE
        if self.resume and path.is_file():
            if json.loads(path.read_text(encoding="utf-8")) != plan:
                raise RTPurboError(
                    f"the interrupted conversion in {self.work} had another model, data or settings: "
                    "repeat its command, or pass --force to start anew."
                )
            return
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)
        write_json_atomically(path, plan)

    def config(self, base: BaseModel, head_map: HeadMap) -> RTPurboConfig:
        """The sparse model's configuration."""
        context = base.model.config.max_position_embeddings
        rule = self.settings.attention or AttentionRule(sliding_window=default_sliding_window(context))
        return RTPurboConfig(head_map, rule, self.settings.indexer)

    def calibrate(self, base: BaseModel) -> RTPurboConfig:
        """The head map, from the work folder if it is there."""
        path = self.work / HEAD_MAP_FILE
        if not path.is_file():
            found = calibrate(
                base.model,
                base.tokenizer,
                self.train_text,
                self.settings.calibration,
                seed=self.settings.seed,
                progress=self.progress,
            )
            write_json_atomically(path, found.to_dict())
        return self.config(base, read_head_map(path))

    def stage1(self, base: BaseModel) -> None:
        """Trained indexers, in the model and in the work folder."""
        self._train_indexers(base, "stage1", self.settings.stage1, on_student=False)

    def stage2(self, base: BaseModel) -> None:
        """Stage 2's weights and refreshed indexers, in the model and in the work folder."""
        settings = self.settings.stage2
        if not settings.steps:
            return
        folder = self.work / "stage2"
        if not folder.is_dir():
            checkpoint = Checkpoint(self.work / "stage2.checkpoint", settings.checkpoint_every)
            self.log.rewind("stage2", checkpoint.steps_done())
            with whole_folder(folder) as output:
                distill(
                    base.model,
                    base.tokenizer,
                    self.train_text,
                    output,
                    settings,
                    teacher_folder=self.work / "teacher",
                    seed=self.settings.seed,
                    log=self.log,
                    checkpoint=checkpoint,
                    progress=self.progress,
                )
        apply_stage2(base.model, folder, "lora" if settings.lora_rank else "full")
        if settings.refresh_steps:
            refresh = replace(
                self.settings.stage1,
                steps=settings.refresh_steps,
                warmup_steps=min(self.settings.stage1.warmup_steps, settings.refresh_steps // 4),
                learning_rate=self.settings.stage1.learning_rate / 2,
            )
            self._train_indexers(base, "refresh", refresh, on_student=True)

    def _train_indexers(self, base: BaseModel, stage: str, settings: Any, *, on_student: bool) -> None:
        path = self.work / f"indexer_{stage}.safetensors"
        if path.is_file():
            load_indexers(base.model, read_tensors(path))
            return
        checkpoint = Checkpoint(self.work / f"{stage}.checkpoint")
        self.log.rewind(stage, checkpoint.steps_done())
        figures = train_indexers(
            base.model,
            base.tokenizer,
            self.train_text,
            self.held_out,
            settings,
            seed=self.settings.seed,
            stage=stage,
            on_student=on_student,
            log=self.log,
            checkpoint=checkpoint,
            progress=self.progress,
        )
        write_json_atomically(self.work / f"{stage}_figures.json", figures)
        save_tensors_atomically(path, indexer_weights(base.model))

    def finish(self, base: BaseModel) -> Path:
        """Puts the artifact together from the work folder, in its place, and clears the work away."""
        stage1 = self.work / "indexer_stage1.safetensors"
        refresh = self.work / "indexer_refresh.safetensors"
        before: dict[str, Tensor] | None = read_tensors(stage1) if refresh.is_file() else None
        stage2 = self.work / "stage2"
        kind = "none" if not stage2.is_dir() else ("lora" if self.settings.stage2.lora_rank else "full")
        artifact = ArtifactConfig(
            base.reference,
            base.model.rtpurbo_config,
            kind,  # type: ignore[arg-type]
            {**self.settings.to_dict(), "data": self.data or "built-in"},
            self._figures(),
        )
        with whole_folder(self.output_dir, self.force) as folder:
            save_artifact(folder, artifact, indexer_weights(base.model), before)
            if kind == "lora":
                shutil.copytree(stage2 / ADAPTER_FOLDER, folder / ADAPTER_FOLDER)
            elif kind == "full":
                shutil.copyfile(stage2 / FULL_WEIGHTS_FILE, folder / FULL_WEIGHTS_FILE)
            if (self.work / LOG_FILE).is_file():
                shutil.copyfile(self.work / LOG_FILE, folder / LOG_FILE)
            (folder / CARD_FILE).write_text(model_card(artifact, None), encoding="utf-8")
        shutil.rmtree(self.work, ignore_errors=True)
        return self.output_dir

    def _figures(self) -> dict[str, Any]:
        """What calibration and the indexers measured about themselves."""
        figures: dict[str, Any] = {}
        head_map = self.work / HEAD_MAP_FILE
        if head_map.is_file():
            figures["stability"] = json.loads(head_map.read_text(encoding="utf-8"))["stability"]
        for stage in ("stage1", "refresh"):
            path = self.work / f"{stage}_figures.json"
            if path.is_file():
                figures[stage] = json.loads(path.read_text(encoding="utf-8"))
        return figures


def read_head_map(path: Path) -> HeadMap:
    """The head map in a file that `calibrate_model` wrote.

    Raises:
        RTPurboError: the file is missing or is not one.
    """
    if not path.is_file():
        raise RTPurboError(f"there is no head map at {path}: write one with `rtpurbo calibrate`.")
    try:
        return head_map_from_dict(json.loads(path.read_text(encoding="utf-8"))["head_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise RTPurboError(f"{path} is not a head map of `rtpurbo calibrate`, or it is corrupt.") from error

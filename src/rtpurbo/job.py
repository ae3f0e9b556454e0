"""One conversion at work: its folder beside the artifact-to-be, and the stages that read and write it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rtpurbo.calibration.calibrate import calibrate
from rtpurbo.config import HeadMap, RTPurboConfig, head_map_from_dict
from rtpurbo.data.texts import load_texts
from rtpurbo.devices import resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.files import (
    check_output_folder,
    save_tensors_atomically,
    whole_folder,
    write_json_atomically,
)
from rtpurbo.models.artifact import (
    ADAPTER_FOLDER,
    CARD_FILE,
    FULL_WEIGHTS_FILE,
    LOG_FILE,
    ArtifactConfig,
    apply_stage2,
    read_tensors,
    save_artifact,
)
from rtpurbo.models.base import BaseModel
from rtpurbo.models.sparsify import indexer_weights, load_indexers
from rtpurbo.reporting.card import model_card
from rtpurbo.settings import ConversionSettings, Progress, check_context, settings_for_context
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.stage1 import train_indexers
from rtpurbo.training.stage2 import distill
from rtpurbo.version import __version__

PLAN_FILE = "plan.json"
HEAD_MAP_FILE = "head_map.json"


class Job:
    """One conversion: its work folder, and the stages that read and write it.

    Every stage leaves one file when it is done and is skipped if the file is there; while it runs it
    keeps a checkpoint.

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
        self.resume, self.progress = resume, progress
        # An interrupted job was allowed to take this place, and may have been stopped just after.
        self.may_replace = force or (resume and self.work.exists())
        self.device = resolve_device(device)
        self.data = list(data) if data else None
        check_output_folder(self.output_dir, self.may_replace)
        if self.work.exists() and not (resume or force):
            raise RTPurboError(
                f"a conversion into {self.output_dir} was interrupted: pass --resume to continue it, "
                "or --force to start anew."
            )
        self.train_text = load_texts(self.data, "train")
        self.held_out = load_texts(self.data, "heldout")
        self.log = TrainingLog(self.work / LOG_FILE)
        self.settings = ConversionSettings()

    def open(self, base: BaseModel, settings: ConversionSettings, command: str) -> None:
        """Makes the work folder, or checks that the one to resume was made for the same job.

        Raises:
            RTPurboError: a training sequence would be longer than the model's context or than the text, or the
                interrupted job was another one.
        """
        self._check_lengths(base, settings)
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

    def _check_lengths(self, base: BaseModel, settings: ConversionSettings) -> None:
        """What would otherwise be found out after minutes of work."""
        longest = max(
            settings.calibration.length, *settings.stage1.lengths, *settings.stage2.lengths
        )
        check_context("sequences", longest, base.model.config.max_position_embeddings)
        self.train_text.sample_tokens(base.tokenizer, longest, random.Random(0))
        self.held_out.sample_tokens(base.tokenizer, max(settings.stage1.lengths), random.Random(0))

    def config(self, base: BaseModel, head_map: HeadMap) -> RTPurboConfig:
        """The sparse model's configuration."""
        settings = settings_for_context(self.settings, base.model.config.max_position_embeddings)
        assert settings.attention is not None
        return RTPurboConfig(head_map, settings.attention, settings.indexer)

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

    def _train_indexers(
        self, base: BaseModel, stage: str, settings: Any, *, on_student: bool
    ) -> None:
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
        kind = (
            "none"
            if not stage2.is_dir()
            else ("lora" if self.settings.stage2.lora_rank else "full")
        )
        artifact = ArtifactConfig(
            base.reference,
            base.model.rtpurbo_config,
            kind,  # type: ignore[arg-type]
            {**self.settings.to_dict(), "data": self._data_names()},
            self._figures(),
        )
        with whole_folder(self.output_dir, self.may_replace) as folder:
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

    def _data_names(self) -> list[str] | str:
        """What was trained on; where the files lay is nobody else's concern."""
        if self.data is None:
            return "built-in"
        return [source if source.startswith("hf:") else Path(source).name for source in self.data]

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
        raise RTPurboError(
            f"{path} is not a head map of `rtpurbo calibrate`, or it is corrupt."
        ) from error

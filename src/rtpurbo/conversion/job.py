"""Conversion job: its work folder, and the stages that read and write it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rtpurbo import strict_json
from rtpurbo.calibration.calibrate import Calibration, calibrate, read_calibration
from rtpurbo.calibration.layer_top_p import CostRows, find_layer_top_p
from rtpurbo.calibration.selection import Stability
from rtpurbo.config import AttentionRule, HeadMap, RTPurboConfig
from rtpurbo.conversion.assembly import (
    HEAD_MAP_FILE,
    TOP_P_FILE,
    assemble,
    figures_file,
    indexers_file,
    stage2_kind,
)
from rtpurbo.conversion.options import JobOptions, check_names, choose_settings, settings_options
from rtpurbo.conversion.output_lock import OutputLock
from rtpurbo.conversion.resuming import write_or_check_plan
from rtpurbo.data.stream import open_stream
from rtpurbo.data.texts import TextCorpus, load_texts
from rtpurbo.devices import base_dtype, resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.files import (
    check_output_folder,
    save_tensors_atomically,
    whole_folder,
    write_json_atomically,
)
from rtpurbo.lengths import STAGES, Stage, lengths_of
from rtpurbo.models.artifact_config import LOG_FILE, ArtifactConfig
from rtpurbo.models.base import BaseModel
from rtpurbo.models.sharding import is_sharded
from rtpurbo.models.sparse_layers import indexer_weights, indexers_in_float32, load_indexers
from rtpurbo.models.stage2_weights import apply_stage2, read_tensors
from rtpurbo.processes import SINGLE_PROCESS, Processes, Result, init_distributed
from rtpurbo.settings import (
    ConversionSettings,
    DistillationSettings,
    IndexerTrainingSettings,
    Progress,
    no_progress,
)
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.pools import read_pools, write_pools
from rtpurbo.training.sequences import Pools
from rtpurbo.training.source import Texts, random_access
from rtpurbo.training.stage1 import train_indexers
from rtpurbo.training.stage2 import distill
from rtpurbo.training.student import check_trainable
from rtpurbo.training.trackers import Trackers, check_trackers

if TYPE_CHECKING:
    from typing_extensions import Unpack


def calibrate_base(
    base: BaseModel,
    texts: TextCorpus,
    settings: ConversionSettings,
    progress: Progress,
    checkpoint: Checkpoint | None = None,
) -> Calibration:
    """Finds the retrieval heads of a base model with the settings of a conversion.

    Raises:
        RTPurboError: as `calibrate`.
    """
    return calibrate(
        base.model,
        base.tokenizer,
        texts,
        settings.calibration,
        rule=settings.attention,
        seed=settings.seed,
        checkpoint=checkpoint,
        progress=progress,
    )


class Job:
    """Conversion with its work folder.

    Every stage writes one file when it is finished and is skipped if the file exists; until then it
    writes checkpoints. With several processes, all do the same, and the main one writes and prints.

    Args:
        output_dir: folder of the artifact.
        **options: see `rtpurbo.conversion.options.JobOptions`.
    """

    def __init__(self, output_dir: str | Path, **options: Unpack[JobOptions]) -> None:
        check_names(options, JobOptions)
        self.options = options
        self.output_dir = Path(output_dir)
        self.work = self.output_dir.absolute().with_name(self.output_dir.name + ".work")
        self.lock = OutputLock(self.output_dir)
        self.resume = options.get("resume", False)
        place = resolve_device(options.get("device", "auto"))
        self.processes = init_distributed(place, options.get("parallel", "data"))
        self.device = self.processes.device(place)
        self.dtype = base_dtype(options.get("dtype", "auto"), self.device)
        progress = options.get("progress", no_progress)
        self.progress = progress if self.processes.is_main else no_progress
        self.data = list(options.get("data") or ()) or None
        self.may_replace = self.processes.from_main(
            lambda: self._check_places(options.get("force", False))
        )
        self._trackers = check_trackers(options.get("report_to", ()))
        self.train_text: Texts
        self.held_out: TextCorpus
        self.log = TrainingLog(None)
        self.pools = Pools()
        self.settings = ConversionSettings()

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *error: object) -> None:
        self.log.trackers.finish()
        self.lock.release()

    def _check_places(self, force: bool) -> bool:
        """Checks that artifact and work folder can be created, and returns True if the artifact may replace another."""
        # An interrupted job had permission to replace the folder.
        may_replace = force or (self.resume and self.work.exists())
        check_output_folder(self.output_dir, may_replace)
        self.lock.acquire()
        if self.work.exists() and not (self.resume or force):
            self.lock.release()
            raise RTPurboError(
                f"a conversion into {self.output_dir} was interrupted: pass --resume to continue it, "
                "or --force to start anew."
            )
        return may_replace

    def choose_settings(self, config: Any, rule: AttentionRule | None = None) -> ConversionSettings:
        """Returns the settings that the options ask for, as `rtpurbo.conversion.options.choose_settings` does."""
        return choose_settings(config, self.device, settings_options(self.options), rule)

    def open(
        self,
        load: Callable[[Job], BaseModel],
        settings: ConversionSettings,
        command: str,
        stages: Sequence[Stage] = STAGES,
    ) -> BaseModel:
        """Reads the texts, loads the model, and makes the work folder or checks the one to resume.

        Args:
            load: loads the dense model.
            settings: of the conversion.
            command: its name.
            stages: stages that will run, for which the texts must be long enough.

        Returns:
            The dense model.

        Raises:
            RTPurboError: texts are missing, unreadable or shorter than a training sequence, all weights of
                a model in half precision are to be trained, the processes cannot share a step, or the
                interrupted job was another.
        """
        self._read_texts(settings)
        base = load(self)
        if "stage2" in stages:
            check_trainable(base.model.dtype, settings.stage2)
        self._check_texts(base, settings, stages)
        self.settings = self.processes.from_main(
            lambda: write_or_check_plan(
                self.work, base, settings, command, self.data, self.processes, self.resume
            )
        )
        if self.processes.is_main:
            trackers = Trackers(
                self._trackers,
                self.output_dir.absolute().with_name(self.output_dir.name + ".runs"),
                self.output_dir.name,
                self.settings.to_dict(),
            )
            self.log = TrainingLog(self.work / LOG_FILE, trackers)
        return base

    def _read_texts(self, settings: ConversionSettings) -> None:
        """Reads the training and the held-out text, or opens their stream."""
        stream = settings.stream
        if stream.enabled:
            self.train_text = open_stream(
                self.data,
                buffer_size=stream.buffer_size,
                held_out=stream.held_out,
                seed=settings.seed,
            )
            self.held_out = self.train_text.held_out
        else:
            self.train_text = load_texts(self.data, "train")
            self.held_out = load_texts(self.data, "heldout")

    def _check_texts(
        self, base: BaseModel, settings: ConversionSettings, stages: Sequence[Stage]
    ) -> None:
        """Refuses texts that are shorter than a sequence, before minutes of work."""
        lengths = lengths_of(settings, stages)
        random_access(self.train_text).sample_tokens(
            base.tokenizer, max(max(each) for each in lengths.values()), random.Random(0)
        )
        # The probe of stage 1 reads held-out text, and so does stage 2 to find the LoRA scale.
        held_out = [*lengths.get("stage1", ())]
        if settings.stage2.lora_scale is None:
            held_out += lengths.get("stage2", ())
        if held_out:
            self.held_out.sample_tokens(base.tokenizer, max(held_out), random.Random(0))

    def config(self, head_map: HeadMap) -> RTPurboConfig:
        """Returns the configuration of the sparse model."""
        return RTPurboConfig(head_map, self.settings.attention, self.settings.indexer)

    def write_pools(
        self, base: BaseModel, *stages: IndexerTrainingSettings | DistillationSettings
    ) -> None:
        """Lets the dense model write training sequences into the work folder, unless they exist.

        Args:
            base: dense model.
            stages: stages that may train on such sequences.

        Raises:
            RTPurboError: documents do not fit their lengths, or the model writes no usable conversation.
        """
        self._with_model(
            base,
            lambda: write_pools(
                base.model,
                base.tokenizer,
                random_access(self.train_text),
                stages,
                self.work,
                seed=self.settings.seed,
                progress=self.progress,
                processes=self._processes_of(base),
            ),
        )
        self.pools = read_pools(self.work)

    def calibrate(self, base: BaseModel) -> RTPurboConfig:
        """Finds the retrieval heads, unless the work folder has a head map, and returns the configuration."""
        path = self.work / HEAD_MAP_FILE
        if not self.processes.from_main(path.is_file):
            checkpoint = Checkpoint(
                self.work / "gates.checkpoint", 10, processes=self._processes_of(base)
            )
            found = self._with_model(
                base,
                lambda: calibrate_base(
                    base, random_access(self.train_text), self.settings, self.progress, checkpoint
                ),
            )
            if self.processes.is_main:
                write_json_atomically(path, found.to_dict())
            self._discard("gates.checkpoint")
        return self.config(self.processes.from_main(lambda: read_calibration(path).head_map))

    def _processes_of(self, base: BaseModel) -> Processes:
        """Returns the processes that run the model together: all if they share the weights, or each alone."""
        return self.processes if is_sharded(base.model) else SINGLE_PROCESS

    def _with_model(self, base: BaseModel, function: Callable[[], Result]) -> Result:
        """Runs a function on the main process, or on all processes if they share the weights."""
        return function() if is_sharded(base.model) else self.processes.from_main(function)

    def stage1(self, base: BaseModel) -> None:
        """Trains the indexers, or loads them from the work folder."""
        self._train_indexers(base, "stage1", self.settings.stage1, on_student=False)

    def store_calibration(self, found: Calibration) -> None:
        """Writes a calibration that was found before into the work folder."""
        if self.processes.is_main:
            write_json_atomically(self.work / HEAD_MAP_FILE, found.to_dict())

    def copy_stage1(
        self, folder: Path, before: ArtifactConfig, indexers: dict[str, Tensor]
    ) -> None:
        """Copies calibration, stage 1 and their figures from the artifact in `folder`."""
        stability = before.figures.get("stability")
        agreed = None if stability is None else Stability(**stability)
        tried = before.figures.get("divergences")
        self.store_calibration(Calibration(before.config.head_map, agreed, divergences=tried))
        if self.processes.is_main:
            save_tensors_atomically(indexers_file(self.work, "stage1"), indexers)
            if "stage1" in before.figures:
                write_json_atomically(figures_file(self.work, "stage1"), before.figures["stage1"])
            if (folder / LOG_FILE).is_file() and not (self.work / LOG_FILE).is_file():
                shutil.copyfile(folder / LOG_FILE, self.work / LOG_FILE)

    def stage2(self, base: BaseModel) -> None:
        """Trains stage 2 and refreshes the indexers, or loads both from the work folder."""
        settings = self.settings.stage2
        if not settings.steps:
            return
        folder = self.work / "stage2"
        if not self.processes.from_main(folder.is_dir):
            checkpoint = self._checkpoint("stage2", settings.checkpoint_every)
            with whole_folder(folder) if self.processes.is_main else nullcontext(folder) as output:
                figures = distill(
                    base.model,
                    base.tokenizer,
                    self.train_text,
                    self.held_out,
                    output,
                    settings,
                    teacher_folder=self.work / "teacher",
                    seed=self.settings.seed,
                    log=self.log,
                    checkpoint=checkpoint,
                    progress=self.progress,
                    processes=self.processes,
                    pools=self.pools,
                )
                if figures and self.processes.is_main:
                    write_json_atomically(figures_file(self.work, "stage2"), figures)
            self.processes.wait()
            self._discard("stage2.checkpoint", "teacher")
        kind = stage2_kind(self.work)
        apply_stage2(base.model, folder, kind)
        if settings.refresh_steps and kind != "none":
            refresh = self.settings.refresh
            self._train_indexers(base, "refresh", refresh, on_student=True)

    def top_p(self, base: BaseModel) -> None:
        """Gives each layer a top-p of its own, or that from the work folder; keeps values that the settings name."""
        settings, path = self.settings.calibration, self.work / TOP_P_FILE
        if not settings.top_p_sequences or self.settings.attention.layer_top_p is not None:
            return
        if not self.processes.from_main(path.is_file):
            costs = self.work / "top_p_costs.json"
            measured = self.processes.from_main(
                lambda: strict_json.read(costs) if costs.is_file() else []
            )

            def store(rows: CostRows) -> None:
                if self.processes.is_main:
                    write_json_atomically(costs, rows)

            found = self._with_model(
                base,
                lambda: find_layer_top_p(
                    base.model,
                    base.tokenizer,
                    random_access(self.train_text),
                    settings,
                    seed=self.settings.seed,
                    measured=measured,
                    store=store,
                    progress=self.progress,
                ),
            )
            if found is None:
                return
            if self.processes.is_main:
                write_json_atomically(path, asdict(found))
        stored = self.processes.from_main(lambda: strict_json.read(path))
        base.model.rtpurbo.set_rule(layer_top_p=tuple(stored["values"]))

    def _train_indexers(
        self, base: BaseModel, stage: str, settings: IndexerTrainingSettings, *, on_student: bool
    ) -> None:
        path = indexers_file(self.work, stage)
        indexers_in_float32(base.model)
        done = self.processes.from_main(lambda: read_tensors(path) if path.is_file() else None)
        if done is not None:
            load_indexers(base.model, done)
            return
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
            checkpoint=self._checkpoint(stage),
            progress=self.progress,
            processes=self.processes,
            pools=self.pools,
        )
        if self.processes.is_main:
            write_json_atomically(figures_file(self.work, stage), figures)
            save_tensors_atomically(path, indexer_weights(base.model))
        self._discard(f"{stage}.checkpoint")

    def _checkpoint(self, stage: str, every: int = 20) -> Checkpoint:
        """Returns the checkpoints of a stage, and removes log entries after the last one."""
        checkpoint = Checkpoint(self.work / f"{stage}.checkpoint", every, processes=self.processes)
        if self.processes.is_main:
            checkpoint.remove_partial_files()
            self.log.rewind(stage, checkpoint.steps_done())
        return checkpoint

    def _discard(self, *names: str) -> None:
        """Removes folders of a finished stage."""
        if self.processes.is_main:
            for name in names:
                shutil.rmtree(self.work / name, ignore_errors=True)

    def finish(self, base: BaseModel) -> Path:
        """Assembles the artifact from the work folder and removes that folder."""
        return self.processes.from_main(
            lambda: assemble(
                self.work, self.output_dir, base, self.settings, self.data, self.may_replace
            )
        )

"""Checkpoints of a stage."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rtpurbo.errors import RTPurboError
from rtpurbo.files import whole_file
from rtpurbo.models.sharding import like, whole
from rtpurbo.processes import SINGLE_PROCESS, Processes

_UNREADABLE = (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError)


class Checkpoint:
    """Checkpoints with trained tensors, optimiser, schedule and position in the data of one stage.

    Each checkpoint is one file, written whole or not at all; only the last few are kept. Tensors are
    stored unsharded and in the order of the parameters, so that any number of processes, with FSDP or
    not, can resume. Queries and targets are drawn by step number, so there is no random state to save.

    Args:
        folder: folder of the files, shared by all processes; None saves nothing.
        every: steps between two checkpoints.
        keep: number of checkpoints to keep; if the last one cannot be read, the one before is restored.
        processes: processes that train; the main one writes.
    """

    def __init__(
        self,
        folder: Path | None,
        every: int = 20,
        *,
        keep: int = 2,
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        self.folder = folder
        self.every = every
        self.keep = keep
        self.processes = processes
        self.position: Any = None
        """Position in the data of the restored checkpoint."""

    def save(
        self,
        step: int,
        parameters: Sequence[Tensor],
        optimizer: Optimizer,
        schedule: LRScheduler | None,
        *,
        position: Callable[[], Any] | None = None,
        force: bool = False,
    ) -> None:
        """Saves a checkpoint if `step` is due; all processes call this together.

        Args:
            step: number of steps done.
            parameters: trained parameters.
            optimizer: their optimiser.
            schedule: learning-rate schedule, if there is one.
            position: returns the position in the data, in plain types.
            force: save at any step.

        Raises:
            RTPurboError: the disk is full; earlier checkpoints are kept.
        """
        if self.folder is None or (step % self.every and not force):
            return
        optimizer_state = optimizer.state_dict()
        optimizer_state["state"] = {
            number: {name: self._gathered(value) for name, value in values.items()}
            for number, values in optimizer_state["state"].items()
        }
        state = {
            "step": step,
            "parameters": [self._gathered(parameter) for parameter in parameters],
            "optimizer": optimizer_state,
            "schedule": None if schedule is None else schedule.state_dict(),
            "position": None if position is None else position(),
        }
        if self.processes.is_main:
            with whole_file(self.folder / f"step-{step:06d}.checkpoint") as temporary:
                torch.save(state, temporary)
            for old in self._files()[: -self.keep]:
                old.unlink()

    def restore(
        self, parameters: Sequence[Tensor], optimizer: Optimizer, schedule: LRScheduler | None
    ) -> int:
        """Restores the last checkpoint and returns the number of steps done; 0 if there is none.

        Raises:
            RTPurboError: no file can be read, or the processes see different files.
        """
        state = self._last()
        step = 0 if state is None else int(state["step"])
        if len(set(self.processes.gather_objects(step))) > 1:
            raise RTPurboError(
                f"the processes see different checkpoints in {self.folder}: put the output folder "
                "on a file system that all machines share."
            )
        if state is None:
            return 0
        with torch.no_grad():
            for parameter, saved in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(like(saved, parameter))
        for number, values in state["optimizer"]["state"].items():
            for name, value in values.items():
                # Step counters are scalars and not sharded.
                if isinstance(value, Tensor) and value.dim():
                    values[name] = like(value, parameters[number])
        optimizer.load_state_dict(state["optimizer"])
        if schedule is not None:
            schedule.load_state_dict(state["schedule"])
        self.position = state.get("position")
        return step

    def steps_done(self) -> int:
        """Returns the number of steps done at the last checkpoint; 0 if there is none."""
        state = self._last()
        return 0 if state is None else int(state["step"])

    def remove_partial_files(self) -> None:
        """Removes partial files that killed processes left behind."""
        if self.folder is not None and self.folder.is_dir():
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)

    def _gathered(self, tensor: Tensor) -> Tensor | None:
        """Returns the unsharded tensor on the CPU of the main process, and None on the others."""
        gathered = whole(tensor.detach())
        return gathered.cpu() if self.processes.is_main else None

    def _files(self) -> list[Path]:
        """Returns the checkpoint files, oldest first."""
        if self.folder is None or not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.glob("step-*.checkpoint") if path.is_file())

    def _last(self) -> dict[str, Any] | None:
        """Returns the newest readable checkpoint; its tensors are memory-mapped."""
        files = self._files()
        for path in reversed(files):
            try:
                return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except _UNREADABLE:
                continue
        if files:
            raise RTPurboError(
                f"no checkpoint in {self.folder} can be read: remove the folder to restart "
                "this stage."
            )
        return None

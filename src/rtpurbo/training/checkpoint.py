"""Where a stage continues after an interruption."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rtpurbo.files import whole_file


class Checkpoint:
    """Trained tensors, optimiser and schedule of one stage, in one file written whole or not at all.

    Sequences and rows are drawn by step number, so there is no random state to keep.

    Args:
        path: the file; None keeps nothing.
        every: steps between two saves.
    """

    def __init__(self, path: Path | None, every: int = 20) -> None:
        self.path = path
        self.every = every

    def save(
        self,
        step: int,
        parameters: Sequence[Tensor],
        optimizer: Optimizer,
        schedule: LRScheduler,
        *,
        force: bool = False,
    ) -> None:
        """Saves after `step` steps, if it is time."""
        if self.path is None or (step % self.every and not force):
            return
        state = {
            "step": step,
            "parameters": [parameter.detach().cpu() for parameter in parameters],
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }
        with whole_file(self.path) as temporary:
            torch.save(state, temporary)

    def restore(
        self, parameters: Sequence[Tensor], optimizer: Optimizer, schedule: LRScheduler
    ) -> int:
        """Loads what was saved last and returns the steps done; 0 if there is nothing."""
        if self.path is None or not self.path.is_file():
            return 0
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for parameter, saved in zip(parameters, state["parameters"], strict=True):
            parameter.data.copy_(saved)
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        return int(state["step"])

    def steps_done(self) -> int:
        """Steps that the last save covers; 0 if there is none."""
        if self.path is None or not self.path.is_file():
            return 0
        return int(torch.load(self.path, map_location="cpu", weights_only=True)["step"])

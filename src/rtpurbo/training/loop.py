"""What surrounds a step in both stages: averages, the update, log, checkpoint, progress, signals."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rtpurbo.interruption import StoppedBySignalError, steps_undisturbed, stop_requested
from rtpurbo.processes import ALONE, Processes
from rtpurbo.settings import (
    DistillationSettings,
    IndexerTrainingSettings,
    Progress,
    no_progress,
)
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.failure import SequenceResult, not_finite
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.optimizer import make_optimizer
from rtpurbo.training.sharding import average_gradients, clip_gradients, gradient_norm

STEPS_TIMED = 20


class StageLoop:
    """The optimiser of a stage, and what happens around its steps on each of the processes.

    A stage calls `steps`, computes gradients, calls `update` and, with what else it measured,
    `report`.

    Args:
        stage: its name.
        parameters: what is trained, by name, in the order in which checkpoints store it.
        settings: steps, learning rate, warm-up, weight decay.
        figures: what sequences may measure beside the loss.
        max_norm: gradients are scaled down to this norm; None leaves them.
        log: where figures go.
        checkpoint: where to continue from and save to.
        progress: told after each step.
        processes: who trains.
    """

    def __init__(
        self,
        stage: str,
        parameters: Mapping[str, Tensor],
        settings: IndexerTrainingSettings | DistillationSettings,
        *,
        figures: Sequence[str] = (),
        max_norm: float | None = None,
        log: TrainingLog | None = None,
        checkpoint: Checkpoint | None = None,
        progress: Progress = no_progress,
        processes: Processes = ALONE,
    ) -> None:
        self.stage = stage
        self.parameters = dict(parameters)
        self.num_steps = settings.steps
        self.figures = tuple(figures)
        self.max_norm = max_norm
        self.log = log or TrainingLog(None)
        self.checkpoint = checkpoint or Checkpoint(None)
        self.progress = progress
        self.processes = processes
        self.optimizer, self.schedule = make_optimizer(
            list(self.parameters.values()),
            settings.learning_rate,
            settings.weight_decay,
            settings.warmup_steps,
            settings.steps,
        )
        self._stop: int | None = None
        self._fleeting: dict[str, float] = {}
        self._times: deque[tuple[float, int]] = deque(maxlen=STEPS_TIMED + 1)
        self._tokens = 0

    def restore(self) -> int:
        """Continues from the last checkpoint, if there is one; returns the steps done."""
        return self.checkpoint.restore(self._weights, self.optimizer, self.schedule)

    @contextmanager
    def steps(self, first: int) -> Iterator[range]:
        """The steps from `first` on; inside, signals wait for the end of a step.

        Raises:
            StoppedBySignalError: a signal came, and a checkpoint was saved.
        """
        self._times.append((time.perf_counter(), 0))
        with steps_undisturbed():
            yield range(first, self.num_steps)

    def update(self, step: int, results: Sequence[SequenceResult]) -> dict[str, float]:
        """Updates the weights with the gradients that this process summed over its sequences.

        Args:
            step: counted from 0.
            results: of this process's sequences; every process has as many.

        Returns:
            Means over the sequences of all processes that have them: loss and figures.

        Raises:
            RTPurboError: a loss or the gradient is not finite; weights are as they were.
        """
        table = self._gather(results)
        average_gradients(self._weights, self.processes, len(results))
        norm = gradient_norm(self._weights)
        if not table[:, 0].isfinite().all() or not norm.isfinite():
            folder = self.checkpoint.folder
            raise not_finite(
                self.stage,
                step + 1,
                results,
                self.parameters,
                float(norm),
                self.processes,
                None if folder is None else folder.parent,
            )
        self._fleeting = {
            "gradient_norm": float(norm),
            "learning_rate": float(self.schedule.get_last_lr()[0]),
        }
        if self.max_norm is not None:
            clip_gradients(self._weights, self.max_norm, norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

        means = {}
        for name, column in zip(("loss", *self.figures), table.T, strict=False):
            present = column[~column.isnan()].tolist()
            if present:
                # Added up in the order of the sequences, whichever process had them.
                means[name] = sum(present) / len(present)
        return means

    def report(
        self,
        step: int,
        figures: Mapping[str, float],
        *,
        shown: Mapping[str, float] | None = None,
        position: Callable[[], Any] | None = None,
    ) -> None:
        """Logs a step, saves a checkpoint if it is time, and stops if a signal came.

        Args:
            step: counted from 0.
            figures: for the log.
            shown: for the progress bar; the log's if None.
            position: asked for the position in the data when a checkpoint is saved.

        Raises:
            RTPurboError: the disk is full.
            StoppedBySignalError: a signal came during the step.
        """
        done = step + 1
        speed = self._tokens_per_second()
        self.log.write(
            {"stage": self.stage, "step": done, **figures},
            tokens_per_second=speed,
            **self._fleeting,
        )
        self.checkpoint.save(
            done,
            self._weights,
            self.optimizer,
            self.schedule,
            position=position,
            force=self._stop is not None or done == self.num_steps,
        )
        self.progress(
            self.stage,
            done,
            self.num_steps,
            {**(figures if shown is None else shown), "tokens_per_second": speed},
        )
        if self._stop is not None:
            raise StoppedBySignalError(self._stop, f"after step {done} of {self.stage}")

    @property
    def _weights(self) -> list[Tensor]:
        return list(self.parameters.values())

    def _gather(self, results: Sequence[SequenceResult]) -> Tensor:
        """Loss and figures of all sequences in their order: fp64 [sequences, 1 + figures].

        What else the processes must agree on travels along: tokens, and whether to stop.
        """
        rows = [
            [
                float(result.loss),
                *(float(result.figures.get(name, math.nan)) for name in self.figures),
                len(result.input_ids),
                stop_requested() or 0,
            ]
            for result in results
        ]
        # NCCL takes nothing from a CPU.
        device = self._weights[0].device if self.processes.count > 1 else "cpu"
        # Sequences are dealt out in turn, so the processes' first ones come first.
        table = self.processes.gather(torch.tensor(rows, dtype=torch.float64, device=device))
        table = table.transpose(0, 1).flatten(0, 1).cpu()
        self._tokens = int(table[:, -2].sum())
        self._stop = int(table[:, -1].max()) or None
        return table[:, :-2]

    def _tokens_per_second(self) -> float:
        """Over the last steps."""
        self._times.append((time.perf_counter(), self._tokens))
        seconds = self._times[-1][0] - self._times[0][0]
        tokens = sum(count for _, count in list(self._times)[1:])
        return tokens / max(seconds, 1e-9)

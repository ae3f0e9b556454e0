"""Training loop of both stages: averaging, update, log, checkpoint, progress, signals."""

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
from rtpurbo.processes import SINGLE_PROCESS, Processes
from rtpurbo.settings import DistillationSettings, IndexerTrainingSettings, Progress, no_progress
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.failure import SequenceResult, not_finite
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.optimizer import make_optimizer
from rtpurbo.training.sharding import average_gradients, clip_gradients, gradient_norm

STEPS_TIMED = 20


class StageLoop:
    """Optimiser, log and checkpoints of a stage on each of the processes.

    A stage iterates over `steps`, computes gradients, and calls `update` and then `report`.

    Args:
        stage: name of the stage.
        parameters: trained parameters by name, in the order in which checkpoints store them.
        settings: steps, learning rate, warm-up, weight decay.
        figures: names of figures that sequences may report besides the loss.
        max_norm: maximum gradient norm; None does not clip.
        log: receives figures.
        checkpoint: restored by `restore` and saved regularly.
        progress: called after each step.
        processes: processes that train.
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
        processes: Processes = SINGLE_PROCESS,
    ) -> None:
        self.stage = stage
        self.parameters = parameters
        self._weights = list(parameters.values())
        self.num_steps = settings.steps
        self.figures = tuple(figures)
        self.max_norm = max_norm
        self.log = log or TrainingLog(None)
        self.checkpoint = checkpoint or Checkpoint(None)
        self.progress = progress
        self.processes = processes
        self.optimizer, self.schedule = make_optimizer(
            self._weights,
            settings.learning_rate,
            settings.weight_decay,
            settings.warmup_steps,
            settings.steps,
        )
        self._stop: int | None = None
        self._unlogged: dict[str, float] = {}
        self._times: deque[tuple[float, int]] = deque(maxlen=STEPS_TIMED + 1)
        self._tokens = 0

    def restore(self) -> int:
        """Restores the last checkpoint, if there is one, and returns the number of steps done."""
        return self.checkpoint.restore(self._weights, self.optimizer, self.schedule)

    @contextmanager
    def steps(self, first: int) -> Iterator[range]:
        """Context that yields the steps from `first` on; signals are delayed to the end of a step.

        Raises:
            StoppedBySignalError: the process received a signal, and a checkpoint was saved.
        """
        self._times.append((time.perf_counter(), 0))
        with steps_undisturbed():
            yield range(first, self.num_steps)

    def update(self, step: int, results: Sequence[SequenceResult]) -> dict[str, float]:
        """Updates the weights with the gradients that this process summed over its sequences, as many on every process.

        Returns:
            Loss and figures, each a mean over the sequences of all processes that report it.

        Raises:
            RTPurboError: a loss or the gradient is not finite; the weights are unchanged.
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
        self._unlogged = {
            "gradient_norm": float(norm),
            "learning_rate": float(self.schedule.get_last_lr()[0]),
        }
        if self.max_norm is not None:
            clip_gradients(self._weights, self.max_norm, norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

        means = dict(zip(("loss", *self.figures), table.nanmean(0).tolist(), strict=True))
        return {name: mean for name, mean in means.items() if not math.isnan(mean)}

    def report(
        self,
        step: int,
        figures: Mapping[str, float],
        *,
        shown: Mapping[str, float] | None = None,
        position: Callable[[], Any] | None = None,
    ) -> None:
        """Logs a step (from 0), saves a checkpoint when due, and stops if a signal was received.

        The progress bar shows other figures than the log if there are any; `position` returns the position in the data.

        Raises:
            StoppedBySignalError: the process received a signal during the step.
        """
        done = step + 1
        speed = self._tokens_per_second()
        self.log.write(
            {"stage": self.stage, "step": done, **figures},
            tokens_per_second=speed,
            **self._unlogged,
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

    def _gather(self, results: Sequence[SequenceResult]) -> Tensor:
        """Returns loss and figures of all sequences in order: fp64 [sequences, 1 + figures].

        Token counts and received signals are gathered in the same call.
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
        # NCCL does not support CPU tensors.
        device = self._weights[0].device if self.processes.count > 1 else "cpu"
        # Sequences are assigned to processes in turn, so the first ones of all processes come first.
        table = self.processes.gather(torch.tensor(rows, dtype=torch.float64, device=device))
        table = table.transpose(0, 1).flatten(0, 1).cpu()
        self._tokens = int(table[:, -2].sum())
        self._stop = int(table[:, -1].max()) or None
        return table[:, :-2]

    def _tokens_per_second(self) -> float:
        """Returns the speed over the last steps."""
        self._times.append((time.perf_counter(), self._tokens))
        seconds = self._times[-1][0] - self._times[0][0]
        tokens = sum(count for _, count in list(self._times)[1:])
        return tokens / max(seconds, 1e-9)

"""Worker pool: several processes that run evaluation jobs at the same time, on all GPUs.

A small model leaves a GPU idle for most of a decode step, and cases are independent of one another.
Each process holds one policy's model. RULER's prompts, which take long to make, are made by the first
process that needs them and shared through a folder.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from types import FrameType

import torch

from rtpurbo.devices import may_lack_memory
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.case_results import Part
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.manifest import RunManifest
from rtpurbo.evaluation.questions.suites import SHORT
from rtpurbo.evaluation.runner import Job, Listener, Runner
from rtpurbo.settings import Progress, no_progress


@dataclass
class Report:
    """Results of a job that ran in a worker process; a `Listener` that is sent to the caller's process.

    Attributes:
        job: which.
        tests: cases that each requested case stands for.
        answers: number of answered samples.
        parts: measurements.
        too_large: the error message, if the job may have run out of memory.
    """

    job: Job
    tests: dict[Case, Sequence[Case]] = field(default_factory=dict)
    answers: int = 0
    parts: list[Part] = field(default_factory=list)
    too_large: str | None = None

    def prepared(self, case: Case, tests: Sequence[Case]) -> None:
        """Records the cases that a requested case stands for."""
        self.tests[case] = tests

    def answered(self, policy: str, count: int = 1) -> None:
        """Counts answered samples."""
        self.answers += count

    def measured(self, part: Part) -> None:
        """Records the measurements of a case."""
        self.parts.append(part)

    def replay(self, listener: Listener) -> None:
        """Repeats all calls for another listener."""
        for case, tests in self.tests.items():
            listener.prepared(case, tests)
        for part in self.parts:
            listener.measured(part)
        listener.answered(self.job.policy, self.answers)


class WorkerPool:
    """Processes that run jobs; `started_workers` starts them and shuts them down.

    Attributes:
        count: number of processes.
    """

    def __init__(self, pool: ProcessPoolExecutor, count: int = 1) -> None:
        self._pool, self.count = pool, count

    def run(
        self, jobs: Sequence[Job], listener: Listener, progress: Progress = no_progress
    ) -> None:
        """Runs jobs as `Runner.run` does; those that run out of memory are repeated at the end, one after the other.

        Prompts are made in the processes, without progress.

        Raises:
            RTPurboError: an error of a job, a job that runs out of memory alone, or a killed process.
        """
        # The longest jobs start first, so that none of them runs alone at the end.
        ordered = [
            job
            for _, own in groupby(jobs, lambda job: job.policy)
            for job in sorted(own, key=_order_of_work)
        ]
        too_large: list[Job] = []
        try:
            for future in as_completed([self._pool.submit(_run, job) for job in ordered]):
                report = future.result()
                if report.too_large:
                    too_large.append(report.job)
                else:
                    report.replay(listener)
            for job in too_large:
                report = self._pool.submit(_run, job).result()
                if report.too_large:
                    raise RTPurboError(
                        f"there is too little memory for {job.policy} at {job.case} while other "
                        f"processes run: ask for fewer of them with --processes ({report.too_large})"
                    )
                report.replay(listener)
        except BrokenProcessPool as error:
            raise RTPurboError(
                "one of the processes that measure was killed, perhaps for lack of memory: ask for "
                "fewer of them with --processes."
            ) from error


def _order_of_work(job: Job) -> float:
    # Short questions have the longest answers.
    return -math.inf if job.case.suite in SHORT else -job.case.context_length


@contextmanager
def started_workers(manifest: RunManifest, count: int) -> Iterator[WorkerPool]:
    """Starts processes, and leaves none of them running at the end of the block.

    With a device `cuda` without a number, they take the GPUs in turn.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as prompts:
        # Each process takes one device, because a pool does not number its processes.
        devices: SimpleQueue[torch.device] = context.SimpleQueue()
        for index in range(count):
            devices.put(_device(torch.device(manifest.source.device), index))
        pool = ProcessPoolExecutor(
            count, context, _start_worker, (manifest, Path(prompts), devices, count)
        )
        try:
            yield WorkerPool(pool, count)
        except BaseException:
            # Running jobs are not wanted any more.
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _device(device: torch.device, index: int) -> torch.device:
    """Returns the device of the process with this index."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", index % torch.cuda.device_count())
    return device


class _Worker:
    """State of a worker process.

    Args:
        new_runner: makes the runner at the first job, so that its errors reach the caller.
    """

    def __init__(self, new_runner: Callable[[], Runner]) -> None:
        self._runner = cache(new_runner)
        self._is_stopping = False

    def run(self, job: Job) -> Report:
        """Runs a job, and reports if it may have run out of memory."""
        if self._is_stopping:
            sys.exit()
        runner, report = self._runner(), Report(job)
        try:
            runner.run([job], report)
        except RuntimeError as error:
            if not may_lack_memory(error):
                raise
            runner.release()
            return Report(job, too_large=str(error))
        finally:
            # Other processes need the memory.
            torch.cuda.empty_cache()
        return report

    def shut_down(self, number: int, frame: FrameType | None) -> None:
        """Abandons the current job and those that the pool has queued for this process."""
        self._is_stopping = True
        sys.exit()


_worker: _Worker


def _start_worker(
    manifest: RunManifest, prompts: Path, devices: SimpleQueue[torch.device], count: int
) -> None:
    global _worker
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    _worker = _Worker(partial(_new_runner, manifest, prompts, devices.get()))
    # Ctrl-C reaches all processes of a terminal; the parent process shuts the workers down.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _worker.shut_down)


def _new_runner(manifest: RunManifest, prompts: Path, device: torch.device) -> Runner:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return manifest.runner(prompts, device)


def _run(job: Job) -> Report:
    return _worker.run(job)

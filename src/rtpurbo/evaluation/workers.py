"""Several processes that take policies through tests side by side, on all GPUs there are.

A small model leaves a GPU idle for most of a decoding step, and its tests have nothing to do with one
another. Each process holds one policy's model; questions of RULER, which take long to make, are made by
the first that needs them and left in a folder for the others.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from types import FrameType

import torch

from rtpurbo.devices import may_lack_memory
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.budgets import budget_of
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.manifest import RunManifest
from rtpurbo.evaluation.parts import CaseResult, Part
from rtpurbo.evaluation.records import Record
from rtpurbo.evaluation.runner import Runner


@dataclass(frozen=True)
class Job:
    """A policy and a case to take it through.

    Attributes:
        policy: its name.
        case: may stand for several tests.
        done: those of them that were taken before.
        read: what the policy that sets budgets made of all tests.
        questions: a part of the case's, if it is divided; None for the whole case.
    """

    policy: str
    case: Case
    done: frozenset[Case]
    read: tuple[Record, ...]
    questions: range | None = None


@dataclass(frozen=True)
class Finished:
    """A job that was done.

    Attributes:
        job: which.
        tests: that its case stands for.
        taken: what the policy made of those that it had not taken.
        part: of a job that is a part of a case, its measurements; the rest of the case is in other jobs.
    """

    job: Job
    tests: list[Case]
    taken: list[CaseResult]
    part: Part | None = None


@dataclass(frozen=True)
class TooLarge:
    """A job for which there may have been too little memory.

    Attributes:
        job: which.
        reason: what was said about it.
    """

    job: Job
    reason: str


class Workers:
    """Processes that do jobs; `started_workers` starts them and shuts them down.

    Attributes:
        count: how many they are.
    """

    def __init__(self, pool: ProcessPoolExecutor, count: int = 1) -> None:
        self._pool, self.count = pool, count

    def do(self, jobs: Sequence[Job]) -> Iterator[Finished]:
        """Does jobs, begun in this order, and gives each when it is done.

        What found too little memory beside others is done again in the end, one after the other.

        Raises:
            RTPurboError: of a job, which may find too little memory alone, or a process was killed.
        """
        too_large: list[Job] = []
        try:
            for future in as_completed([self._pool.submit(_do, job) for job in jobs]):
                if isinstance(done := future.result(), Finished):
                    yield done
                else:
                    too_large.append(done.job)
            for job in too_large:
                if isinstance(done := self._pool.submit(_do, job).result(), TooLarge):
                    raise RTPurboError(
                        f"there is too little memory for {job.policy} at {job.case} beside other "
                        f"processes: ask for fewer of them with --processes ({done.reason})"
                    )
                yield done
        except BrokenProcessPool as error:
            raise RTPurboError(
                "one of the processes that measure was killed, perhaps for lack of memory: ask for "
                "fewer of them with --processes."
            ) from error


@contextmanager
def started_workers(manifest: RunManifest, count: int) -> Iterator[Workers]:
    """So many processes, until the end of the block, which leaves none of them at work.

    Args:
        manifest: what they follow. Where its device is `cuda` without a number, they take the GPUs in
            turn.
        count: of processes.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as questions:
        # Each process takes one: which it is in the pool, it is not told.
        devices: SimpleQueue[torch.device] = context.SimpleQueue()
        for index in range(count):
            devices.put(_device(torch.device(manifest.source.device), index))
        pool = ProcessPoolExecutor(
            count, context, _begin, (manifest, Path(questions), devices, count)
        )
        try:
            yield Workers(pool, count)
        except BaseException:
            # Nobody waits for tests that are not wanted any more.
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def _device(device: torch.device, index: int) -> torch.device:
    """The device of the process of this index."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", index % torch.cuda.device_count())
    return device


@dataclass
class _Worker:
    """State of a worker process; its runner is made by the first job, whose errors reach the caller."""

    manifest: RunManifest
    questions: Path
    device: torch.device
    runner: Runner | None = None
    is_stopping: bool = False

    def do(self, job: Job) -> Finished | TooLarge:
        """Does the job, if there is memory for it."""
        if self.is_stopping:
            sys.exit()
        if self.runner is None:
            task_suite = self.manifest.task_suite(self.questions)
            self.runner = self.manifest.runner(task_suite, self.device)
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
        try:
            return self._finished(job, self.runner)
        except RuntimeError as error:
            if not may_lack_memory(error):
                raise
            self.runner.release()
            return TooLarge(job, str(error))
        finally:
            # What is kept for later is missing elsewhere.
            torch.cuda.empty_cache()

    def _finished(self, job: Job, runner: Runner) -> Finished:
        tests = runner.prepare(job.policy, [job.case])[job.case]
        if job.questions is not None:
            budget = budget_of(job.policy, job.case, job.read)
            part = runner.take_part(job.policy, job.case, budget, job.questions)
            return Finished(job, tests, [], part)
        taken: list[CaseResult] = []
        for test in tests:
            if test not in job.done:
                budget = budget_of(job.policy, test, job.read)
                runner.take(job.policy, test, budget, taken.append)
        return Finished(job, tests, taken)

    def shutdown(self, number: int, frame: FrameType | None) -> None:
        """Abandons the current job and those that the pool has queued for this process."""
        self.is_stopping = True
        sys.exit()


_worker: _Worker


def _begin(
    manifest: RunManifest, questions: Path, devices: SimpleQueue[torch.device], count: int
) -> None:
    global _worker
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    _worker = _Worker(manifest, questions, devices.get())
    # Ctrl-C reaches all processes of a terminal; the parent process shuts the workers down.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _worker.shutdown)


def _do(job: Job) -> Finished | TooLarge:
    return _worker.do(job)

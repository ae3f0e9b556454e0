"""SIGTERM and Ctrl-C: a long job finishes the step it is at, saves what it has and stops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rtpurbo.launch import started_by_torchrun

SIGNALS = (signal.SIGTERM, signal.SIGINT)
RESUME = "pass --resume to the same command to continue."


class StoppedBySignalError(KeyboardInterrupt):
    """The job was asked to stop and did.

    Like every KeyboardInterrupt it passes through `except Exception`.

    Args:
        number: of the signal.
        where: how far it came, such as "after step 12 of stage1".
        advice: how to go on.
    """

    def __init__(self, number: int, where: str = "", advice: str = RESUME) -> None:
        self.number = number
        place = f" {where}" if where else ""
        super().__init__(f"stopped by {signal.Signals(number).name}{place}: {advice}")

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells have it: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number


class _Requests:
    """State of this process's signal handlers."""

    def __init__(self) -> None:
        self.depth = 0
        self.pending: int | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        # A second signal is impatience: it stops at once, with what was saved last. But torchrun
        # passes on what its processes may have got already.
        if self.depth and (self.pending is None or started_by_torchrun()):
            self.pending = self.pending or number
            return
        self.pending = None
        raise StoppedBySignalError(number)


_requests = _Requests()


@contextmanager
def stopping_cleanly(seconds: float | None = None) -> Iterator[None]:
    """Turns SIGTERM and Ctrl-C into `StoppedBySignalError` inside, at the end of a step where one is under way.

    Outside the main thread, where Python allows no handlers, signals do what they did before, and there
    is no time limit.

    Args:
        seconds: after which this process sends itself SIGTERM; None never does.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _requests.receive) for number in SIGNALS}
    timer = threading.Timer(seconds or 0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    try:
        if seconds is not None:
            timer.start()
        yield
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)
        _requests.pending = None


@contextmanager
def steps_undisturbed() -> Iterator[None]:
    """Inside, a first signal waits until somebody asks `stop_requested`, or until the end.

    Of several within one another, the end is that of the outermost.

    Raises:
        StoppedBySignalError: at the end, if a signal waits and nobody asked.
    """
    number = None
    _requests.depth += 1
    try:
        yield
    finally:
        _requests.depth -= 1
        if not _requests.depth:
            number, _requests.pending = _requests.pending, None
    if number is not None:
        raise StoppedBySignalError(number)


@contextmanager
def signals_held() -> Iterator[None]:
    """Delays SIGTERM and Ctrl-C until the end of the block, for a few short steps.

    Outside the main thread, where Python allows no handlers, they do not.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    before = {
        number: signal.signal(number, lambda received, frame: waiting.append(received))
        for number in SIGNALS
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            # None stands for a handler that is not Python's.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for received in waiting:
            signal.raise_signal(received)


def stop_requested() -> int | None:
    """The signal that waits, if one does."""
    return _requests.pending

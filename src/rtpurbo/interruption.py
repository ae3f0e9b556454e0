"""Handling of SIGTERM and Ctrl-C: a long job finishes its step, saves its state and stops."""

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
    """Raised when a job has stopped because of a signal.

    As a KeyboardInterrupt, it is not caught by `except Exception`.

    Args:
        number: number of the signal.
        where: place of the stop, such as "after step 12 of stage1".
        advice: how to continue.
    """

    def __init__(self, number: int, where: str = "", advice: str = RESUME) -> None:
        self.number = number
        place = f" {where}" if where else ""
        super().__init__(f"stopped by {signal.Signals(number).name}{place}: {advice}")

    @property
    def exit_code(self) -> int:
        """Exit code as in shells, 128 plus the signal's number: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.number


class _Requests:
    """State of this process's signal handlers."""

    def __init__(self) -> None:
        self.depth = 0
        self.pending: int | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        # A second signal stops at once, with the last saved state. Under torchrun a process may receive the
        # same signal twice.
        if self.depth and (self.pending is None or started_by_torchrun()):
            self.pending = self.pending or number
            return
        self.pending = None
        raise StoppedBySignalError(number)


_requests = _Requests()


@contextmanager
def stopping_cleanly(seconds: float | None = None) -> Iterator[None]:
    """Context in which SIGTERM and Ctrl-C raise `StoppedBySignalError`, at the end of the current step if there is one.

    Outside the main thread, where Python does not support handlers, signals keep their effect, and there is no
    time limit.

    Args:
        seconds: time after which this process sends itself SIGTERM; None for no limit.
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
    """Context in which a first signal is delayed until `stop_requested` is checked, or until the end.

    Nested contexts end with the outermost one.

    Raises:
        StoppedBySignalError: at the end, if a signal is pending.
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

    Outside the main thread, where Python does not support handlers, it has no effect.
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
            # None is a handler that was not installed by Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for received in waiting:
            signal.raise_signal(received)


def stop_requested() -> int | None:
    """Returns the pending signal, or None."""
    return _requests.pending

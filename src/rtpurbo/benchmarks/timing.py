"""Time and peak memory of a call, measured with CUDA events on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

Call = Callable[[], Any]

# Calls of at least this many milliseconds are timed once: repeats would change little and take long.
SLOW = 1000.0
# Milliseconds of warm-up calls before fast calls are timed, until the GPU reaches its usual clock rate.
WARM_UP = 200.0
# Milliseconds of all timed calls together; at least MIN_REPEATS calls are timed.
BUDGET = 3000.0
MIN_REPEATS = 3
# Cycles for which the GPU sleeps while the host prepares a first call: about 0.1 s.
HEAD_START_CYCLES = 2 * 10**8


class Clock:
    """Wall clock of the host, for devices that run synchronously and whose memory is not counted."""

    def first(self, call: Call) -> float:
        """Returns the milliseconds of the first call, without one-time work of the host."""
        return self.times(call, 1)[0]

    def times(self, call: Call, repeats: int) -> list[float]:
        """Returns the milliseconds of each of `repeats` consecutive calls."""
        spans = []
        for _ in range(repeats):
            start = self.now()
            call()
            spans.append((start, self.now()))
        return self.between(spans)

    def now(self) -> Any:
        """Returns a point in time, for `between`."""
        return time.perf_counter()

    def between(self, spans: Sequence[tuple[Any, Any]]) -> list[float]:
        """Returns the milliseconds between pairs of points in time."""
        return [1000 * (end - start) for start, end in spans]

    def memory(self) -> int | None:
        """Returns the bytes in use; None where memory is not counted."""
        return None

    def peak_memory(self) -> int | None:
        """Returns the peak of the bytes in use since `reset_peak`; None where memory is not counted."""
        return None

    def reset_peak(self) -> None:
        """Resets the peak to the current use."""


class CudaClock(Clock):
    """CUDA events on the current stream: host work that overlaps with the GPU's is not counted."""

    def first(self, call: Call) -> float:
        """Lets the GPU wait until the host has prepared the call."""
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START_CYCLES)
        return super().first(call)

    def now(self) -> Any:
        """Records an event."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, spans: Sequence[tuple[Any, Any]]) -> list[float]:
        """Waits for the GPU, and returns the times between events."""
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in spans]

    def memory(self) -> int | None:
        """Returns the allocated bytes."""
        return torch.cuda.memory_allocated()

    def peak_memory(self) -> int | None:
        """Returns the peak of the allocated bytes."""
        return torch.cuda.max_memory_allocated()

    def reset_peak(self) -> None:
        """Resets the peak."""
        torch.cuda.reset_peak_memory_stats()


def clock_of(device: torch.device) -> Clock:
    """Clock for a device."""
    return CudaClock() if device.type == "cuda" else Clock()


@dataclass(frozen=True)
class Measurement:
    """Time and memory of repeated calls.

    Attributes:
        milliseconds: median.
        milliseconds_p10: 10th percentile.
        milliseconds_p90: 90th percentile.
        repeats: number of timed calls.
        peak_memory_bytes: peak memory, inputs included; None if not counted.
        scratch_bytes: part of the peak that was neither allocated before the call nor is its result.
    """

    milliseconds: float
    milliseconds_p10: float
    milliseconds_p90: float
    repeats: int
    peak_memory_bytes: int | None = None
    scratch_bytes: int | None = None

    def per(self, count: int) -> Measurement:
        """Measurement of one of `count` equal parts of each call."""
        return replace(
            self,
            milliseconds=self.milliseconds / count,
            milliseconds_p10=self.milliseconds_p10 / count,
            milliseconds_p90=self.milliseconds_p90 / count,
        )


def measure(call: Call, clock: Clock, repeats: int, result_bytes: int = 0) -> Measurement:
    """Times a call at most `repeats` times; the first run is a warm-up, and counts only if it is slow.

    The bytes of a call's result do not count as scratch.
    """
    clock.reset_peak()
    before = clock.memory()
    first = clock.first(call)
    peak = clock.peak_memory()
    scratch = None
    if first >= SLOW:
        times = [first]
    else:
        count = max(MIN_REPEATS, min(repeats, int(BUDGET / max(first, 1e-3))))
        if first < WARM_UP:
            clock.times(call, min(count, int(WARM_UP / max(first, 1e-3))))
        times = clock.times(call, count)
    if before is not None and peak is not None:
        scratch = max(0, peak - before - result_bytes)
    median, low, high = map(float, np.quantile(times, (0.5, 0.1, 0.9)))
    return Measurement(median, low, high, len(times), peak, scratch)


def max_calls(repeats: int) -> int:
    """Largest number of calls for a check and `measure`: the check, the first, warm-up and timed ones."""
    return 2 + 2 * max(MIN_REPEATS, repeats)


def replayed(calls: Sequence[Call], device: torch.device) -> Call:
    """One call that runs all `calls`: on a GPU the replay of a CUDA graph."""

    def run_all() -> None:
        for call in calls:
            call()

    if device.type != "cuda":
        return run_all
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_all()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_all()

    def replay() -> None:
        # A graph does not keep its inputs alive: this reference to the calls does.
        assert calls
        graph.replay()

    return replay


class PartTimer:
    """Times the last whole call, and the parts of it that are marked.

    Args:
        device: device that the call runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = clock_of(device)
        self._spans: list[tuple[Any, Any]] = []

    @contextmanager
    def around_whole(self) -> Iterator[None]:
        """Context manager around a call; discards earlier times."""
        self._spans.clear()
        with self.around_part():
            yield

    @contextmanager
    def around_part(self) -> Iterator[None]:
        """Context manager around a part of a call."""
        start = self._clock.now()
        yield
        self._spans.append((start, self._clock.now()))

    def milliseconds(self) -> tuple[float, float]:
        """Milliseconds of the last whole call, and the sum of its parts."""
        # The whole ends last.
        *parts, whole = self._clock.between(self._spans)
        return whole, sum(parts)

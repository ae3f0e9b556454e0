"""How long a call takes, and how much memory: on a GPU by its own clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]

# Calls of at least this many milliseconds are timed once: a second one tells little and takes long.
SLOW = 1000.0
# Milliseconds of calls that come before fast ones are timed, until the GPU has its usual clock rate.
WARM_UP = 200.0
MIN_REPEATS = 3
# Cycles for which the GPU is kept waiting while the host prepares a first call: a tenth of a second.
HEAD_START_CYCLES = 2 * 10**8


class Clock(Protocol):
    """Times calls on a device, and weighs them."""

    def first(self, call: Call) -> float:
        """Milliseconds of the first call, without what the host does once."""

    def times(self, call: Call, repeats: int) -> list[float]:
        """Milliseconds of each of some calls in a row."""

    def memory(self) -> int | None:
        """Bytes in use; None if nobody counts them."""

    def peak_memory(self) -> int | None:
        """The most bytes in use at once since `forget_peak`."""

    def forget_peak(self) -> None:
        """Starts counting anew."""


class CudaClock:
    """Events on the GPU's own stream: what the host does beside the GPU's work does not count."""

    def first(self, call: Call) -> float:
        """See `Clock`."""
        torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START_CYCLES)
        return self.times(call, 1)[0]

    def times(self, call: Call, repeats: int) -> list[float]:
        """See `Clock`."""
        events = []
        for _ in range(repeats):
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def memory(self) -> int | None:
        """See `Clock`."""
        return torch.cuda.memory_allocated()

    def peak_memory(self) -> int | None:
        """See `Clock`."""
        return torch.cuda.max_memory_allocated()

    def forget_peak(self) -> None:
        """See `Clock`."""
        torch.cuda.reset_peak_memory_stats()


class WallClock:
    """The host's clock, for devices that work while the host waits."""

    def first(self, call: Call) -> float:
        """See `Clock`."""
        return self.times(call, 1)[0]

    def times(self, call: Call, repeats: int) -> list[float]:
        """See `Clock`."""
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            call()
            times.append(1000 * (time.perf_counter() - start))
        return times

    def memory(self) -> int | None:
        """See `Clock`."""
        return None

    def peak_memory(self) -> int | None:
        """See `Clock`."""
        return None

    def forget_peak(self) -> None:
        """See `Clock`."""


def clock_of(device: torch.device) -> Clock:
    """The clock that suits a device."""
    return CudaClock() if device.type == "cuda" else WallClock()


@dataclass(frozen=True)
class Measurement:
    """What some calls took.

    Attributes:
        milliseconds: the median.
        milliseconds_p10: a tenth of the calls were faster.
        milliseconds_p90: a tenth of the calls were slower.
        repeats: calls.
        peak_memory_bytes: the most memory in use at once, inputs included; None if not counted.
        scratch_bytes: of these, what was neither there before nor the result.
    """

    milliseconds: float
    milliseconds_p10: float
    milliseconds_p90: float
    repeats: int
    peak_memory_bytes: int | None = None
    scratch_bytes: int | None = None

    def per(self, count: int) -> Measurement:
        """The same if each call did its work this many times."""
        return Measurement(
            self.milliseconds / count,
            self.milliseconds_p10 / count,
            self.milliseconds_p90 / count,
            self.repeats,
            self.peak_memory_bytes,
            self.scratch_bytes,
        )


def measure(
    call: Call, clock: Clock, repeats: int, budget: float = 3.0, result_bytes: int = 0
) -> Measurement:
    """Times a call; its first run warms up, and counts only if it is slow.

    Args:
        call: what to time.
        clock: whose time it is.
        repeats: calls at the most.
        budget: seconds that these calls may take together, though there are always a few.
        result_bytes: what a call's result weighs.
    """
    clock.forget_peak()
    before = clock.memory()
    first = clock.first(call)
    peak = clock.peak_memory()
    scratch = None
    if first >= SLOW:
        times = [first]
    else:
        count = max(MIN_REPEATS, min(repeats, int(1000 * budget / max(first, 1e-3))))
        if first < WARM_UP:
            clock.times(call, min(count, int(WARM_UP / max(first, 1e-3))))
        times = clock.times(call, count)
    if before is not None and peak is not None:
        scratch = max(0, peak - before - result_bytes)
    return Measurement(
        quantile(times, 0.5), quantile(times, 0.1), quantile(times, 0.9), len(times), peak, scratch
    )


def quantile(values: Sequence[float], share: float) -> float:
    """The value that a share of the values lie below; between two values, in proportion."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def replayed(calls: Sequence[Call], device: torch.device) -> Call:
    """One call that does the work of several: on a GPU as a CUDA graph, without the host."""

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
        # A graph does not keep what it reads; this holds the calls, and they hold it.
        assert calls
        graph.replay()

    return replay

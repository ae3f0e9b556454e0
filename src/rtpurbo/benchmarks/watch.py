"""How much of a call goes into some of its parts, by the clock of the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Watch:
    """Times the last whole call, and the parts of it that it was told about.

    Args:
        device: where the work is done.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._whole: tuple[Any, Any] | None = None
        self._parts: list[tuple[Any, Any]] = []

    @contextmanager
    def around_whole(self) -> Iterator[None]:
        """Around a call; forgets the one before."""
        self._parts = []
        start = self._now()
        yield
        self._whole = start, self._now()

    @contextmanager
    def around_part(self) -> Iterator[None]:
        """Around a part of a call."""
        start = self._now()
        yield
        self._parts.append((start, self._now()))

    def milliseconds(self) -> tuple[float, float]:
        """Of the last whole call, and of its parts together."""
        assert self._whole is not None
        if self._on_gpu:
            torch.cuda.synchronize()
        return self._between(*self._whole), sum(self._between(*part) for part in self._parts)

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) if self._on_gpu else 1000 * (end - start)

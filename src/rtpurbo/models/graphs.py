"""CUDA graphs: a step is captured once and replayed by one launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

import torch
from torch import Tensor

from rtpurbo.models.sparse_layer import SparseAttention


class CudaGraph:
    """A captured step, replayed by one launch.

    Args:
        step: runs the step and returns its logits, always at the same addresses.
        rewind: takes the step back, so that it can run again.
        device: where it runs.
    """

    # One for each device: libraries keep memory for every stream that they have met.
    streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(
        self, step: Callable[[], Tensor], rewind: Callable[[], None], device: torch.device
    ) -> None:
        with torch.cuda.device(device):
            if device not in self.streams:
                self.streams[device] = torch.cuda.Stream()
            self._capture(step, rewind, torch.cuda.current_stream(), self.streams[device])

    def _capture(
        self,
        step: Callable[[], Tensor],
        rewind: Callable[[], None],
        current: torch.cuda.Stream,
        side: torch.cuda.Stream,
    ) -> None:
        side.wait_stream(current)
        with torch.cuda.stream(side):
            # PyTorch wants a run on another stream first. A synchronisation of host and
            # device is found here, where it does no harm: it would break a capture.
            with refusing_waits():
                step()
            rewind()
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        # Matrix products find their workspace in the graph's own memory, and leave it there.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # Other threads may go on using the device.
            with torch.cuda.graph(
                self._graph, pool=pool, stream=side, capture_error_mode="thread_local"
            ):
                self._logits = step()
        except Exception:
            _end_broken_capture(current, pool)
            raise
        finally:
            torch._C._cuda_clearCublasWorkspaces()

    @staticmethod
    def suits(device: torch.device) -> bool:
        """True if this device supports graphs now."""
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    @staticmethod
    def refusal(modules: list[SparseAttention]) -> str | None:
        """Why the step that just ran cannot be captured; None if it can."""
        if any(module.used_backend != "triton" for module in modules):
            return "attention runs without kernels here"
        return None

    def __call__(self) -> Tensor:
        """Runs the step on the device; what Python counts is left alone."""
        self._graph.replay()
        return self._logits


@contextmanager
def refusing_waits() -> Iterator[None]:
    """Makes an error of every operation in which the host waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that it may miss some
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _end_broken_capture(stream: torch.cuda.Stream, pool: Any) -> None:
    """After a capture that failed, PyTorch still is where it was within: brings it back."""
    torch.cuda.set_stream(stream)
    with suppress(Exception):
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
    with suppress(Exception):
        generator = torch.cuda.default_generators[stream.device_index]
        generator.graphsafe_set_state(generator.clone_state())

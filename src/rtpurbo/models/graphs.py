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
        rewind: undoes the step, so that it can run again.
        device: device of the step.
    """

    # One for each device: libraries allocate memory for every stream.
    streams: ClassVar[dict[torch.device, torch.cuda.Stream]] = {}

    def __init__(
        self, step: Callable[[], Tensor], rewind: Callable[[], None], device: torch.device
    ) -> None:
        with torch.cuda.device(device):
            self._capture(step, rewind, device)

    def _capture(
        self, step: Callable[[], Tensor], rewind: Callable[[], None], device: torch.device
    ) -> None:
        current = torch.cuda.current_stream()
        if device not in self.streams:
            self.streams[device] = torch.cuda.Stream()
        side = self.streams[device]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            # PyTorch requires a run on a side stream first. A synchronisation of host and device
            # is found here: during the capture it would be an error that breaks the stream.
            with refusing_waits():
                step()
            rewind()
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        pool = torch.cuda.graph_pool_handle()
        # The workspace of matrix products is allocated in the graph's own memory.
        torch._C._cuda_clearCublasWorkspaces()
        try:
            # Other threads may use the device meanwhile.
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
    def supports(device: torch.device) -> bool:
        """True if this device supports graphs now."""
        return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    @staticmethod
    def refusal(modules: list[SparseAttention]) -> str | None:
        """Returns the reason why the last step cannot be captured; None if it can."""
        if any(module.used_backend != "triton" for module in modules):
            return "attention runs without kernels here"
        return None

    def __call__(self) -> Tensor:
        """Replays the step on the device; counters in Python do not change."""
        self._graph.replay()
        return self._logits


@contextmanager
def refusing_waits() -> Iterator[None]:
    """Raises an error in every operation in which the host waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that it may miss some
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _end_broken_capture(stream: torch.cuda.Stream, pool: Any) -> None:
    """Restores PyTorch's stream, memory pool and generator after a failed capture."""
    torch.cuda.set_stream(stream)
    with suppress(Exception):
        torch._C._cuda_endAllocateToPool(stream.device_index, pool)
    with suppress(Exception):
        generator = torch.cuda.default_generators[stream.device_index]
        generator.graphsafe_set_state(generator.clone_state())

"""Processes of distributed training and their communication.

`torchrun` starts them; for a single process nothing is initialised. Only the main process writes files and
prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rtpurbo.errors import RTPurboError
from rtpurbo.launch import started_by_torchrun

Parallelism = Literal["data", "fsdp"]
"""Kinds of parallelism: each process holds the whole model, or a part of every layer."""

Result = TypeVar("Result")

_TENSOR_PARALLEL = (
    "tensor parallelism is not offered: every head has its own window, indexer and share of the "
    "cache, so a layer cannot be cut into equal groups of heads; choose --parallel fsdp, which "
    "divides the memory of the weights among the processes as well."
)


def check_parallelism(name: str) -> Parallelism:
    """Returns the parallelism of a name.

    Raises:
        RTPurboError: it is not supported.
    """
    if name == "data":
        return "data"
    if name == "fsdp":
        return "fsdp"
    if name == "tensor":
        raise RTPurboError(_TENSOR_PARALLEL)
    raise RTPurboError(f"there is no parallelism '{name}': choose data or fsdp.")


@dataclass(frozen=True)
class Processes:
    """Process of a job.

    Attributes:
        index: rank of this process, over all machines.
        count: number of processes.
        local_index: rank of this process on its machine.
        parallelism: kind of parallelism.
    """

    index: int = 0
    count: int = 1
    local_index: int = 0
    parallelism: Parallelism = "data"

    @property
    def shard_weights(self) -> bool:
        """True if each process holds only a part of the model's weights."""
        return self.count > 1 and self.parallelism == "fsdp"

    @property
    def is_main(self) -> bool:
        """True if this process writes files and messages."""
        return self.index == 0

    def device(self, device: torch.device) -> torch.device:
        """Returns the device of this process: one GPU for each process."""
        if self.count > 1 and device.type == "cuda":
            return torch.device("cuda", self.local_index)
        return device

    def wait(self) -> None:
        """Waits for all processes."""
        if self.count > 1:
            dist.barrier()

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over the processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def gather(self, values: Tensor) -> Tensor:
        """Gathers the values [...] of all processes as [count, ...] on each of them."""
        if self.count == 1:
            return values[None]
        gathered = [torch.empty_like(values) for _ in range(self.count)]
        dist.all_gather(gathered, values)
        return torch.stack(gathered)

    def gather_objects(self, value: Any) -> list[Any]:
        """Gathers a value of every process, in their order, on all of them."""
        if self.count == 1:
            return [value]
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, value)
        return gathered

    def from_main(self, function: Callable[[], Result]) -> Result:
        """Calls a function on the main process and returns its result on all processes.

        Raises:
            RTPurboError: on all processes, if the function raises it.
        """
        if self.count == 1:
            return function()
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except RTPurboError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome)
        result, message = outcome
        if message is not None:
            raise RTPurboError(message)
        return result


SINGLE_PROCESS = Processes()


def init_distributed(device: torch.device, parallelism: str = "data") -> Processes:
    """Initialises communication with the processes that `torchrun` started, if there are any.

    Args:
        device: device of the computation; the backend is gloo for `cpu`, NCCL for `cuda`.
        parallelism: `data` or `fsdp`.

    Raises:
        RTPurboError: the parallelism is not supported.
    """
    checked = check_parallelism(parallelism)
    if not started_by_torchrun():
        return Processes(parallelism=checked)
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    return Processes(state.process_index, state.num_processes, state.local_process_index, checked)


def shutdown_distributed() -> None:
    """Ends the communication, so that the process exits without a warning."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()

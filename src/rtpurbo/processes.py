"""The processes that train together: which one this is, and what they tell each other.

`torchrun` starts them; alone, a process talks to nobody and nothing is initialised. Only the main one
writes files and prints.
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
"""How several processes share a training: each holds the model, or each a part of every layer."""

Result = TypeVar("Result")

_TENSOR_PARALLEL = (
    "tensor parallelism is not offered: every head has its own window, indexer and share of the "
    "cache, so a layer cannot be cut into equal groups of heads; choose --parallel fsdp, which "
    "divides the memory of the weights among the processes as well."
)


def check_parallelism(name: str) -> Parallelism:
    """The parallelism of this name.

    Raises:
        RTPurboError: it is not offered.
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
    """One of the processes of a job.

    Attributes:
        index: of this process, over all machines.
        count: of all processes.
        local_index: of this process on its machine.
        parallelism: how they share the work.
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
        """The GPU of this process, where `device` leaves open which."""
        if self.count > 1 and device.type == "cuda":
            return torch.device("cuda", self.local_index)
        return device

    def wait(self) -> None:
        """Waits until all processes are here."""
        if self.count > 1:
            dist.barrier()

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Replaces each tensor by its sum over the processes, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def gather(self, values: Tensor) -> Tensor:
        """The values of all processes: from [...] on each to [count, ...] on all of them."""
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
        """Calls a function on the main process alone and gives its result to all.

        Raises:
            RTPurboError: on every process, if the function raises it.
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


ALONE = Processes()


def join_processes(device: torch.device, parallelism: str = "data") -> Processes:
    """Joins the processes that `torchrun` started; a process alone stays alone.

    Args:
        device: where they compute; decides how they talk (gloo for `cpu`, NCCL for `cuda`).
        parallelism: `data` or `fsdp`.

    Raises:
        RTPurboError: the parallelism is not offered.
    """
    checked = check_parallelism(parallelism)
    if not started_by_torchrun():
        return Processes(parallelism=checked)
    from accelerate import PartialState

    state = PartialState(cpu=device.type == "cpu")
    return Processes(state.process_index, state.num_processes, state.local_process_index, checked)


def leave_processes() -> None:
    """Ends the talk that `join_processes` began, so that the process can exit without a warning."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()

"""Gradients of weights that may be sharded over processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rtpurbo.models.sharding import whole
from rtpurbo.processes import Processes


@torch.no_grad()
def average_gradients(
    parameters: Iterable[Tensor], processes: Processes, num_sequences: int
) -> None:
    """Turns gradients that each process summed over its sequences, as many on each, into means over all sequences.

    A parameter without a gradient gets zeros, as other processes may have one.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if isinstance(parameter, DTensor):
            # FSDP has averaged the gradient over the processes.
            parameter.grad.div_(num_sequences)
        else:
            processes.all_reduce([parameter.grad])
            parameter.grad.div_(num_sequences * processes.count)


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """Returns the 2-norm of all gradients together, fp32 [], equal on all processes."""
    norms = [
        whole(get_total_norm(part)).float()
        for part in _by_sharding([weight.grad for weight in parameters])
        if part
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(parameters: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scales all gradients in place so that their norm is at most `max_norm`."""
    for part in _by_sharding(parameters):
        clip_grads_with_norm_(part, max_norm, norm)


def _by_sharding(tensors: Iterable[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    present = [tensor for tensor in tensors if tensor is not None]
    return (
        [tensor for tensor in present if isinstance(tensor, DTensor)],
        [tensor for tensor in present if not isinstance(tensor, DTensor)],
    )

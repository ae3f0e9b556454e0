"""Gradients and copies of weights of which each process may hold a part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from rtpurbo.models.sharding import own_part, whole
from rtpurbo.processes import Processes


@torch.no_grad()
def average_gradients(
    parameters: Iterable[Tensor], processes: Processes, num_sequences: int
) -> None:
    """Turns gradients that each process summed over its sequences into means over all sequences.

    Args:
        parameters: what is trained; one without a gradient gets zeros, as others may have one.
        processes: who trains.
        num_sequences: of this step on this process; the others have as many.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if isinstance(parameter, DTensor):
            # FSDP has averaged them over the processes.
            parameter.grad.div_(num_sequences)
        else:
            processes.add_up([parameter.grad])
            parameter.grad.div_(num_sequences * processes.count)


def gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, fp32 []; the same on all processes."""
    norms = [
        whole(get_total_norm(part)).float()
        for part in _divided_and_not([weight.grad for weight in parameters])
        if part
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_gradients(parameters: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scales all gradients down, in place, so that their norm is at most `max_norm`."""
    for part in _divided_and_not(parameters):
        clip_grads_with_norm_(part, max_norm, norm)


def mixed(parameters: Iterable[Tensor]) -> bool:
    """Whether some are divided and some not, so that no fused operation takes both."""
    return len({isinstance(weight, DTensor) for weight in parameters}) > 1


def _divided_and_not(tensors: Iterable[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    present = [tensor for tensor in tensors if tensor is not None]
    return (
        [tensor for tensor in present if isinstance(tensor, DTensor)],
        [tensor for tensor in present if not isinstance(tensor, DTensor)],
    )


def restore_weights(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Puts back what each process had copied of its parts of some weights."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in before:
                own_part(weight).copy_(before[name])

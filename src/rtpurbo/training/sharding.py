"""Weights divided among processes (FSDP), and what training needs to do with such weights.

Every decoder layer is divided, whose weights a process then gathers while the layer runs. Embeddings
and the final norm stay whole: tied embeddings are read in two places. Indexers stay whole too: they
are small, and stage 1 reads them outside their layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import PreTrainedModel

from rtpurbo.processes import Processes


def shard(model: PreTrainedModel, processes: Processes) -> None:
    """Divides the decoder layers of a model among the processes, if they share their work so.

    The model stays divided: load it anew to use it whole.

    Args:
        model: the same on all processes; what is trained is known by `requires_grad`.
        processes: who trains.
    """
    if processes.count == 1 or processes.parallelism != "fsdp":
        return
    mesh = init_device_mesh(model.device.type, (processes.count,))
    for layer in model.base_model.layers:
        kept = {weight for name, weight in layer.named_parameters() if ".indexer." in f".{name}"}
        # Stage 1 may run layers one by one, so each has to look after itself.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=kept)


def is_divided(model: nn.Module) -> bool:
    """Whether `shard` divided the model."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process may hold a part; all processes call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: a view, all of it if it is not divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, on the device of a parameter and divided as it is."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    return distribute_tensor(
        tensor.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        src_data_rank=None,
    )


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

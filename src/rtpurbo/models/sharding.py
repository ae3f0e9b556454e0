"""Weights sharded over processes (FSDP2): loading, and access to whole weights.

The weights of every decoder layer are sharded; a process gathers them while the layer runs. Embeddings
and the final norm are replicated: tied embeddings are read in two places, and the loss reads the output
embedding outside its module. Indexers and LoRA weights, added later, are replicated too: they are small.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from rtpurbo.errors import RTPurboError
from rtpurbo.processes import Processes


class Sharding(NamedTuple):
    """Processes that each hold a part of a model, and the device of this one."""

    processes: Processes
    device: torch.device


def load_sharded(
    name: str, sharding: Sharding, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Loads a model of which each process holds only its shard of every decoder layer; all processes call it together.

    transformers reads just the slices that a process keeps, but shards the embeddings too; its tensors
    are therefore moved, without a copy, into a model whose decoder layers alone are sharded.

    Returns:
        The model, and the loading information of `from_pretrained`.

    Raises:
        RTPurboError: this version of transformers cannot shard while it loads.
    """
    try:
        from transformers.distributed import DistributedConfig

        distributed = DistributedConfig(fsdp_size=sharding.processes.count)
    except (ImportError, TypeError) as error:
        raise RTPurboError(
            "--parallel fsdp loads each process's part of the weights with transformers 5.17 or later: "
            "upgrade transformers, or choose --parallel data."
        ) from error
    source, loading = AutoModelForCausalLM.from_pretrained(
        name, distributed_config=distributed, output_loading_info=True, **options
    )
    return _with_sharded_layers(source, sharding), loading


def _with_sharded_layers(source: PreTrainedModel, sharding: Sharding) -> PreTrainedModel:
    """The same model and tensors, with sharded decoder layers and everything else replicated."""
    processes, device = sharding
    config = source.config
    del config.distributed_config
    # fully_shard replaced the class by a subclass of it.
    plain_class: type[PreTrainedModel] = next(
        each
        for each in type(source).__mro__
        if issubclass(each, PreTrainedModel) and not issubclass(each, FSDPModule)
    )
    with torch.device("meta"):
        model = plain_class(config)
    loaded = dict(source.named_parameters())
    for parameter_name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(loaded[parameter_name].dtype)
    mesh = init_device_mesh(device.type, (processes.count,))
    for layer in model.base_model.layers:
        # Stage 1 may run layers one by one, so each is an FSDP root of its own.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)

    weights: dict[str, Tensor] = {}
    for parameter_name, parameter in model.named_parameters():
        tensor = loaded.pop(parameter_name).detach()
        if isinstance(parameter, DTensor):
            weights[parameter_name] = DTensor.from_local(
                own_part(tensor).to(device),
                parameter.device_mesh,
                parameter.placements,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        else:
            weights[parameter_name] = whole(tensor).to(device)
    # Tied weights are named once; buffers that are not stored, such as rotary frequencies, come below.
    model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    for buffer_name, buffer in source.named_buffers():
        owner, _, short_name = buffer_name.rpartition(".")
        setattr(model.get_submodule(owner), short_name, buffer.to(device))
    model.generation_config = source.generation_config
    left = [
        key for key, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta
    ]
    assert not left, f"not loaded: {left}"
    return model


def is_sharded(model: nn.Module) -> bool:
    """True if a process holds only a part of the model's weights."""
    return any(isinstance(weight, DTensor) for weight in model.parameters())


def require_gradients(model: nn.Module) -> None:
    """Enables gradients of all weights except indexers; all processes call it together.

    FSDP keeps a second parameter for the gathered weights, with a flag of its own that stays as it was
    when the layer first ran.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            _require_gradients(module)
            module.reshard()
    _require_gradients(model)


def _require_gradients(module: nn.Module) -> None:
    for name, weight in module.named_parameters():
        if ".indexer." not in name:
            weight.requires_grad_(True)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a tensor of which each process may hold a part; all processes call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: a view, all of it if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, the same on all processes, on the device of a parameter and sharded as it is."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    return distribute_tensor(
        tensor.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        src_data_rank=None,
    )

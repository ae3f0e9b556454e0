"""The difference between two models of one shape, at a low rank: small enough to ship a teacher.

Matrices are kept as the best product of two thin ones (truncated singular value decomposition), in 8
bits, vectors whole in fp32. What a rank cannot hold is lost, unless the difference was trained at
that rank.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from rtpurbo.errors import RTPurboError
from rtpurbo.files import save_tensors_atomically, whole_folder, write_json_atomically
from rtpurbo.models.base import BaseModel
from rtpurbo.models.pretrained import fingerprint

TENSORS = "difference.safetensors"
ORIGIN = "difference.json"


def factors(before: Tensor, after: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The two thin matrices whose product is nearest to what was added to a matrix.

    Args:
        before: [out, in].
        after: the same shape; decides where to compute.
        rank: columns of the first and rows of the second; a smaller matrix has no more than its side.

    Returns:
        fp32 [out, rank] and [rank, in]; each takes the root of the singular values.
    """
    difference = after.detach().float() - before.detach().float().to(after.device)
    left, values, right = torch.linalg.svd(difference, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def save_difference(
    base: BaseModel, model: PreTrainedModel, folder: Path, rank: int
) -> dict[str, float]:
    """Writes the difference of a model from its base model, and the model's configuration.

    Weights that are equal in bfloat16, in which models are saved, are left out.

    Args:
        base: base model.
        model: model to approximate by base model and difference.
        folder: output folder, written whole or not at all.
        rank: rank of each matrix's difference; if its factors would not be smaller, the difference is stored
            in bfloat16.

    Returns:
        `kept`, the share of the squared difference that remains after truncation and rounding, and the
        `bytes` of the file.
    """
    before = dict(base.model.named_parameters())
    tensors: dict[str, Tensor] = {}
    total = lost = 0.0
    for name, parameter in model.named_parameters():
        after, old = parameter.detach().float().cpu(), before[name].detach().float().cpu()
        if torch.equal(after.bfloat16(), old.bfloat16()):
            continue
        difference = after.double() - old.double()
        if difference.dim() == 1:
            stored = {name: difference.float()}
        elif difference.dim() == 2 and _gets_smaller(difference, rank):
            up, down = factors(old, parameter, rank)
            stored = {
                **_rounded(f"{name}.up", up.cpu(), 0),
                **_rounded(f"{name}.down", down.cpu(), 1),
            }
        else:
            stored = {name: difference.bfloat16()}
        tensors |= stored
        total += float(difference.square().sum())
        lost += float((difference - _added(name, stored)).square().sum())
    with whole_folder(folder) as made:
        save_tensors_atomically(made / TENSORS, tensors)
        model.config.save_pretrained(made)
        found = {"kept": 1 - lost / total if total else 1.0}
        found["bytes"] = (made / TENSORS).stat().st_size
        write_json_atomically(
            made / ORIGIN,
            {
                "base_model": base.reference.name,
                "fingerprint": base.reference.fingerprint,
                "rank": rank,
                **found,
            },
        )
    return found


def with_difference(base: BaseModel, folder: Path) -> PreTrainedModel:
    """Returns a new model: the base model plus a difference, with the saved configuration.

    Sums are computed in fp64 on the CPU and rounded once, so that the bfloat16 weights are the same on every
    machine and in any order of additions: artifacts identify their base model by its weights.

    Args:
        base: base model in the precision from which the difference was made; its fingerprint is the same in
            fp32 and bfloat16, but the sums may differ.
        folder: output of `save_difference`.

    Raises:
        RTPurboError: the difference belongs to another base model, or its files are damaged.
    """
    name, wanted = _origin(folder)
    try:
        tensors = load_file(folder / TENSORS)
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(folder, error) from error
    if fingerprint(base.model) != wanted:
        raise RTPurboError(f"{folder} belongs to other weights than those given: load {name}.")
    try:
        model = type(base.model)(config)
        model.load_state_dict(base.model.state_dict())
        _add(model, tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        raise RTPurboError(
            f"{folder} holds a difference that does not fit its base model: make it again."
        ) from error
    return model.to(base.model.device).eval().requires_grad_(False)


def base_model_of(folder: Path) -> str:
    """Returns the name of the base model to which a difference belongs.

    Raises:
        RTPurboError: the folder has no readable difference.
    """
    return _origin(folder)[0]


def _origin(folder: Path) -> tuple[str, str]:
    """Returns name and fingerprint of the base model."""
    try:
        origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
        return origin["base_model"], origin["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(folder, error) from error


def _unreadable(folder: Path, error: Exception) -> RTPurboError:
    return RTPurboError(f"{folder} holds no difference that can be read ({error}): make it again.")


def _gets_smaller(difference: Tensor, rank: int) -> bool:
    """True if its 8-bit factors, with two fp32 scales per component, are below 2 bytes per entry."""
    components = min(rank, *difference.shape)
    return components * (sum(difference.shape) + 8) < 2 * difference.numel()


def _rounded(name: str, factor: Tensor, dim: int) -> dict[str, Tensor]:
    """A factor in 8 bits, with a scale for each component of the rank; its entries lie along `dim`."""
    scale = factor.abs().amax(dim, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return {name: (factor / scale).round().to(torch.int8), f"{name}_scale": scale}


@torch.no_grad()
def _add(model: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Adds all that is stored; a part that is missing, or that is nobody's, is an error."""
    parameters = dict(model.named_parameters())
    for name in {name if name in parameters else name.rpartition(".")[0] for name in tensors}:
        parameter, added = parameters[name], _added(name, tensors)
        if added.shape != parameter.shape:
            raise ValueError(f"{name} has another shape")
        parameter.copy_(parameter.double() + added)


def _added(name: str, tensors: dict[str, Tensor]) -> Tensor:
    """Difference that is added to a parameter, fp64."""
    if name in tensors:
        return tensors[name].double()
    up, down = (
        tensors[f"{name}.{part}"].double() * tensors[f"{name}.{part}_scale"].double()
        for part in ("up", "down")
    )
    return up @ down

"""The difference between two models of one shape, at a low rank: small enough to ship a teacher.

Matrices are kept as the best product of two thin ones (truncated singular value decomposition), vectors
whole. Unlike a LoRA that was trained as one, such a difference loses what its rank cannot hold.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from rtpurbo.errors import RTPurboError
from rtpurbo.files import save_tensors_atomically, whole_folder, write_json_atomically
from rtpurbo.models.base import BaseModel, fingerprint

TENSORS = "difference.safetensors"
ORIGIN = "difference.json"


def save_difference(
    base: BaseModel, model: PreTrainedModel, folder: Path, rank: int
) -> dict[str, float]:
    """Writes what has to be added to a base model, and the other model's configuration.

    Args:
        base: what it will be added to.
        model: what the sum comes near to.
        folder: to make, whole or not at all.
        rank: of every matrix's difference; one that would not get smaller is kept whole.

    Returns:
        `kept`, the share of the squared difference that the rank holds, and `bytes` of the file.
    """
    before = dict(base.model.named_parameters())
    tensors: dict[str, Tensor] = {}
    total = kept = 0.0
    for name, after in model.named_parameters():
        difference = after.detach().float() - before[name].detach().float().to(after.device)
        total += float(difference.square().sum())
        if difference.dim() != 2 or rank * sum(difference.shape) >= difference.numel():
            tensors[name] = difference.bfloat16()
            kept += float(difference.square().sum())
            continue
        left, values, right = torch.linalg.svd(difference, full_matrices=False)
        root = values[:rank].sqrt()
        tensors[f"{name}.up"] = (left[:, :rank] * root).bfloat16()
        tensors[f"{name}.down"] = (root[:, None] * right[:rank]).bfloat16()
        kept += float(values[:rank].square().sum())
    with whole_folder(folder) as made:
        save_tensors_atomically(made / TENSORS, {key: each.cpu() for key, each in tensors.items()})
        model.config.save_pretrained(made)
        base.tokenizer.save_pretrained(made)
        found = {"kept": kept / total if total else 1.0}
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
    """The base model with a difference added: another model, with the configuration that was saved.

    Raises:
        RTPurboError: the difference belongs to another base model.
    """
    origin = json.loads((folder / ORIGIN).read_text(encoding="utf-8"))
    if fingerprint(base.model) != origin["fingerprint"]:
        raise RTPurboError(
            f"{folder} belongs to other weights than those given: load {origin['base_model']}."
        )
    config = AutoConfig.from_pretrained(folder)
    model = type(base.model)(config)
    model.load_state_dict(base.model.state_dict())
    parameters = dict(model.named_parameters())
    tensors = load_file(folder / TENSORS)
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in parameters:
                parameters[name] += tensor
            elif name.endswith(".up"):
                matrix = name.removesuffix(".up")
                parameters[matrix] += tensor.float() @ tensors[f"{matrix}.down"].float()
    return model.to(base.model.device).eval().requires_grad_(False)

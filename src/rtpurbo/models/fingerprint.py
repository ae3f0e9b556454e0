"""Fingerprint of base weights: whether two models are the same one."""

from __future__ import annotations

import hashlib

import torch

from rtpurbo.models.sharding import whole

_VALUES = 64


def fingerprint(model: torch.nn.Module) -> str:
    """Returns a SHA-256 that tells base weights apart, in a moment even for large models.

    It covers the name, shape and up to 64 evenly spaced values of each parameter. The values are
    rounded to bfloat16, so that loading the same weights in float32 or bfloat16 gives the same
    fingerprint; float16 does not, so it must be taken before a cast to that. What adapters (LoRA)
    and token indexers add to a model does not count. All processes that hold parts of a sharded
    model call it together.
    """
    parameters: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if "lora_" not in name and "indexer" not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameters[name] = parameter.detach()

    digest = hashlib.sha256()
    for name, weights in sorted(parameters.items()):
        # Sharded weights are gathered one at a time.
        values = whole(weights).reshape(-1)
        stride = max(1, -(-values.numel() // _VALUES))
        values = values[::stride].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(weights.shape)}\n".encode())
        digest.update(values.numpy().astype("<i2").tobytes())
    return digest.hexdigest()

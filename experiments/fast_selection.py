"""The selection of `rtpurbo.ops.eager` without its slowest part on a GPU, for whole prompts of many rows.

Adding the keys of every row of a prompt of 8,192 tokens up into blocks by scattering them takes seconds a
forward. Keys that lie in order can be added up where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from rtpurbo.ops.eager import selection


@contextmanager
def fast_selection(block_size: int, device: torch.device) -> Iterator[None]:
    """Replaces the slow part inside a `with` block, on a GPU; no sequence may be padded there.

    Args:
        block_size: of the attention rule in use.
        device: elsewhere than on a GPU nothing is replaced.
    """

    def sum_blocks(mass: Tensor, blocks: Tensor, num_blocks: int | None = None) -> Tensor:
        padded = F.pad(mass, (0, -mass.shape[-1] % block_size))
        return padded.unflatten(-1, (-1, block_size)).sum(-1)

    def spread_blocks(chosen: Tensor, blocks: Tensor) -> Tensor:
        return chosen.repeat_interleave(block_size, -1)[..., : blocks.shape[-1]]

    replacements = {"sum_blocks": sum_blocks, "spread_blocks": spread_blocks}
    if device.type != "cuda":
        replacements = {}
    before = {name: getattr(selection, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(selection, name, replacement)
    try:
        yield
    finally:
        for name, original in before.items():
            setattr(selection, name, original)

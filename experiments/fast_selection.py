"""The selection of `rtpurbo.ops.eager` without its slowest parts on a GPU, for whole prompts of many rows.

Sorting every row of a prompt of 8,192 tokens takes seconds a forward, and adding keys up into blocks by
scattering them nearly as long. A threshold found by bisection gives the same sets as sorting (ties
and rounding apart), and keys that lie in order can be added up where they lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from rtpurbo.ops.eager import selection


@triton.jit
def _top_set_kernel(
    mass_pointer,
    target_pointer,
    chosen_pointer,
    num_entries,
    SIZE: tl.constexpr,  # noqa: N803
    COUNTING: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    entries = tl.arange(0, SIZE)
    inside = entries < num_entries
    mass = tl.load(mass_pointer + row * num_entries + entries, mask=inside, other=0.0)
    target = tl.load(target_pointer + row)
    # Floats that are not negative are ordered as their bits are.
    bits = mass.to(tl.int32, bitcast=True)
    worth = mass
    if COUNTING:
        worth = tl.where(mass > 0, 1.0, 0.0)
    # Entries from `high` on do not reach the target. Those from `low` on do, or all that have mass
    # must be taken; a target that nothing is needed for drives `low` beyond every mass.
    low = tl.full([], 1, tl.int32)
    high = tl.full([], 0x7F800000, tl.int32)
    for _ in range(31):
        middle = low + (high - low) // 2
        reached = tl.sum(tl.where(bits >= middle, worth, 0.0), 0) >= target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    tl.store(chosen_pointer + row * num_entries + entries, (bits >= low).to(tl.int8), mask=inside)


def top_set(mass: Tensor, target: Tensor, *, counting: bool = False) -> Tensor:
    """The heaviest entries of each row whose sum (or whose number) reaches a target, and no more.

    Args:
        mass: fp32, non-negative [..., entries].
        target: [...]; at or below 0 selects nothing, out of reach everything that has mass.
        counting: reach the target with the number of entries.

    Returns:
        bool [..., entries].
    """
    mass, target = mass.contiguous(), target.float().contiguous()
    chosen = torch.empty(mass.shape, dtype=torch.int8, device=mass.device)
    size = triton.next_power_of_2(mass.shape[-1])
    _top_set_kernel[(target.numel(),)](
        mass,
        target,
        chosen,
        mass.shape[-1],
        SIZE=size,
        COUNTING=counting,
        num_warps=min(32, max(4, size // 1024)),
    )
    return chosen.view(torch.bool)


def heaviest(mass: Tensor, count: int) -> Tensor:
    """As `selection.heaviest`."""
    return top_set(mass, torch.full_like(mass[..., 0], float(count)), counting=True)


@contextmanager
def fast_selection(block_size: int, device: torch.device) -> Iterator[None]:
    """Replaces the slow parts inside a `with` block, on a GPU; no sequence may be padded there.

    Args:
        block_size: of the attention rule in use.
        device: elsewhere than on a GPU nothing is replaced.
    """

    def sum_blocks(mass: Tensor, blocks: Tensor, num_blocks: int | None = None) -> Tensor:
        padded = F.pad(mass, (0, -mass.shape[-1] % block_size))
        return padded.unflatten(-1, (-1, block_size)).sum(-1)

    def spread_blocks(chosen: Tensor, blocks: Tensor) -> Tensor:
        return chosen.repeat_interleave(block_size, -1)[..., : blocks.shape[-1]]

    replacements: dict[str, Any] = {
        "smallest_set": top_set,
        "heaviest": heaviest,
        "sum_blocks": sum_blocks,
        "spread_blocks": spread_blocks,
    }
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

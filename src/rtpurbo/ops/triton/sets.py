"""The heaviest entries of rows without sorting them: the sets of `rtpurbo.ops.eager.selection`, by bisection.

A threshold that is found by looking again and again at a row that lies in the cache gives the same set
as sorting it: entries of equal mass apart, of which all are taken, and sums that round otherwise.

N entries of a row looked at together.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_TOGETHER = 8192
# Bits of an fp32 number beside its sign.
NUM_BITS = tl.constexpr(31)
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def top_set_kernel(
    masses,
    targets,
    chosen,
    num_entries,
    N: tl.constexpr,
    COUNTING: tl.constexpr,
):
    """Program (row): writes to `chosen` [rows, entries] which of `masses` [rows, entries] reach `targets` [rows]."""
    row = tl.program_id(0).to(tl.int64)
    masses += row * num_entries
    chosen += row * num_entries
    target = tl.load(targets + row)
    lanes = tl.arange(0, N)
    # Numbers that are not negative are ordered as their bits are. Entries from `high` on do not reach the
    # target. Those from `low` on do, or all that have mass must be taken; a target that nothing is
    # needed for drives `low` beyond every mass.
    low = tl.full([], 1, tl.int32)
    high = tl.full([], INFINITY_BITS, tl.int32)
    for _ in range(NUM_BITS):
        middle = low + (high - low) // 2
        reached = tl.zeros([N], tl.float32)
        for start in range(0, num_entries, N):
            mass = tl.load(masses + start + lanes, mask=start + lanes < num_entries, other=0.0)
            worth = mass
            if COUNTING:
                worth = tl.where(mass > 0, 1.0, 0.0)
            reached += tl.where(mass.to(tl.int32, bitcast=True) >= middle, worth, 0.0)
        is_enough = tl.sum(reached, 0) >= target
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle)
    for start in range(0, num_entries, N):
        inside = start + lanes < num_entries
        mass = tl.load(masses + start + lanes, mask=inside, other=0.0)
        is_chosen = mass.to(tl.int32, bitcast=True) >= low
        tl.store(chosen + start + lanes, is_chosen.to(tl.int8), mask=inside)


def top_set(mass: Tensor, target: Tensor, *, counting: bool = False) -> Tensor:
    """The heaviest entries of each row whose sum (or whose number) reaches a target, and no more.

    Args:
        mass: non-negative [..., entries], fp32 or less.
        target: [...]; at or below 0 selects nothing, out of reach everything that has mass.
        counting: reach the target with the number of entries.

    Returns:
        bool [..., entries].
    """
    mass, target = mass.float().contiguous(), target.float().contiguous()
    chosen = torch.empty(mass.shape, dtype=torch.int8, device=mass.device)
    if mass.numel():
        together = min(MOST_TOGETHER, triton.next_power_of_2(mass.shape[-1]))
        # A model's layers may lie on several devices.
        with torch.cuda.device_of(mass):
            top_set_kernel[(target.numel(),)](
                mass,
                target,
                chosen,
                mass.shape[-1],
                N=together,
                COUNTING=counting,
                num_warps=max(1, min(8, together // 512)),
            )
    return chosen.view(torch.bool)


def heaviest(mass: Tensor, count: int) -> Tensor:
    """As `rtpurbo.ops.eager.selection.heaviest`."""
    return top_set(mass, torch.full_like(mass[..., 0], float(count)), counting=True)

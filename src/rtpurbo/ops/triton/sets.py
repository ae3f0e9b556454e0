"""Top-p and top-k sets without sorting: the sets of `rtpurbo.ops.eager.selection`, by bisection.

Bisecting the threshold, over a row that stays in the cache, gives the same set as sorting, except that entries
of equal mass are taken together and that sums round differently.

N entries of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_TILE = 8192
# Bits of an fp32 number without its sign.
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
    """Program (row): writes the mask `chosen` of the set of `masses`, both [rows, entries], for `targets` [rows]."""
    row = tl.program_id(0).to(tl.int64)
    masses += row * num_entries
    chosen += row * num_entries
    target = tl.load(targets + row)
    lanes = tl.arange(0, N)
    # Non-negative fp32 numbers are ordered like their bits. The entries from `high` on do not reach the target;
    # those from `low` on do, or all entries with mass are needed. A target at or below 0 drives `low` above
    # every mass.
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
    """Smallest set of the largest entries of each row whose sum (or number) reaches a target.

    Args:
        mass: non-negative [..., entries], fp32 or less.
        target: [...]; 0 or less selects nothing, an unreachable target every entry with mass.
        counting: compare the number of entries with the target, not their sum.

    Returns:
        bool [..., entries].
    """
    mass, target = mass.float().contiguous(), target.float().contiguous()
    chosen = torch.empty(mass.shape, dtype=torch.int8, device=mass.device)
    if mass.numel():
        tile = min(MAX_TILE, triton.next_power_of_2(mass.shape[-1]))
        # The layers of a model may be on several devices.
        with torch.cuda.device_of(mass):
            top_set_kernel[(target.numel(),)](
                mass,
                target,
                chosen,
                mass.shape[-1],
                N=tile,
                COUNTING=counting,
                num_warps=max(1, min(8, tile // 512)),
            )
    return chosen.view(torch.bool)


def top_k(mass: Tensor, count: int) -> Tensor:
    """Same as `rtpurbo.ops.eager.selection.top_k`."""
    return top_set(mass, torch.full_like(mass[..., 0], float(count)), counting=True)

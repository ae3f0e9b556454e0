"""Mean values of blocks of keys, which stand in for unselected far keys (`rtpurbo.ops.eager.unselected`)."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_values(
    values: Tensor, blocks: Tensor, block_size: int, first_slots: Tensor | None = None
) -> Tensor:
    """Mean values of some blocks of a contiguous cache, without synchronisation with the device.

    Args:
        values: [batch, num_key_value_heads, capacity, head_dim].
        blocks: int64 [batch, num_blocks], blocks of `block_size` positions, aligned to position 0. The
            result is undefined for a block that is not whole.
        block_size: positions in a block.
        first_slots: int32 [batch], slot of position 0; None for 0.

    Returns:
        [batch, num_key_value_heads, num_blocks, head_dim] in the dtype of the values.
    """
    slots = blocks[..., None] * block_size + torch.arange(block_size, device=values.device)
    if first_slots is not None:
        slots = slots + first_slots[:, None, None]
    slots = slots.flatten(1).clamp(0, values.shape[2] - 1)
    shape = (*values.shape[:2], slots.shape[1], values.shape[3])
    return block_means(values.gather(2, slots[:, None, :, None].expand(shape)), block_size)


def block_means(values: Tensor, block_size: int) -> Tensor:
    """Means of consecutive values: [batch, heads, length / block_size, head_dim], summed in at least fp32."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    return values.unflatten(2, (-1, block_size)).mean(3, dtype=dtype).to(values.dtype)

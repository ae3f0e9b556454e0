"""Mean values of whole blocks in a cache layer, for rules with `unselected` `block_means`."""

from __future__ import annotations

import torch
from torch import Tensor

from rtpurbo.devices import has_triton
from rtpurbo.ops.value_means import block_means, mean_values


class ValueMeans:
    """`KeyValueStates.value_means` of the full KV heads of a layer.

    Args:
        block_size: positions in a block.

    Attributes:
        storage: [batch, num_full_key_value_heads, num_blocks, head_dim], blocks of the whole capacity; None
            before the first token.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.storage: Tensor | None = None

    def reserve(self, values: Tensor) -> Tensor:
        """Returns the storage, with as many blocks as the values [batch, heads, capacity, head_dim] need."""
        num_blocks = -(-values.shape[2] // self.block_size)
        if self.storage is None or self.storage.shape[2] != num_blocks:
            storage = values.new_zeros(*values.shape[:2], num_blocks, values.shape[3])
            if self.storage is not None:
                kept = min(num_blocks, self.storage.shape[2])
                storage[:, :, :kept] = self.storage[:, :, :kept]
            self.storage = storage
        return self.storage

    def update(
        self, values: Tensor, new: int, length: int | Tensor, first_slots: Tensor | None
    ) -> Tensor:
        """Writes the means of the blocks that the last tokens completed.

        The shapes do not depend on the data, so that a step can be captured in a CUDA graph.

        Args:
            values: [batch, heads, capacity, head_dim].
            new: tokens appended last.
            length: slots in use, or int32 [1] on the device.
            first_slots: int32 [batch], slot of position 0; None for 0.

        Returns:
            The storage.
        """
        means, block_size = self.reserve(values), self.block_size
        if first_slots is None:
            assert isinstance(length, int)
            first, end = (length - new) // block_size, length // block_size
            if first < end:
                completed = values[:, :, first * block_size : end * block_size]
                means[:, :, first:end] = block_means(completed, block_size)
        elif isinstance(length, Tensor) and _has_kernel(values):
            # Needs Triton.
            from rtpurbo.ops.triton.decode.value_means import update_value_means

            update_value_means(means, values, length, first_slots, block_size)
        else:
            # Where a sequence has fewer whole blocks, block 0 is written until it is whole.
            count = min(new // block_size + 1, means.shape[2])
            end_blocks = (length - first_slots).long() // block_size
            blocks = torch.arange(-count, 0, device=values.device) + end_blocks[:, None]
            blocks = blocks.clamp(min=0)
            completed = mean_values(values, blocks, block_size, first_slots)
            means.scatter_(2, blocks[:, None, :, None].expand_as(completed), completed)
        return means


def _has_kernel(values: Tensor) -> bool:
    return values.is_cuda and values.dtype != torch.float64 and has_triton()

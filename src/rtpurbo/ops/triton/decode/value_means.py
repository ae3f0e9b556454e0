"""Update of the stored block means in a decode step whose length is on the device.

B sequences, K full KV heads, D head_dim; T tokens of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rtpurbo.ops.triton.addresses import head_start
from rtpurbo.ops.triton.decode.workspace import strides

# Largest number of elements of a tile of values.
TILE_ELEMENTS = 4096


@triton.jit
def value_means_kernel(
    values,
    value_strides,
    means,
    mean_strides,
    length,
    first_slots,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Program (KV head, sequence): the mean of the block that the last token completes, if it does."""
    head = tl.program_id(0)
    sequence = tl.program_id(1)
    first_slot = tl.load(first_slots + sequence)
    num_tokens = tl.load(length) - first_slot
    if (num_tokens > 0) & (num_tokens % BLOCK_SIZE == 0):
        dims = tl.arange(0, WIDTH)
        in_head = dims < HEAD_DIM
        tokens = tl.arange(0, TILE)
        values = head_start(values, sequence, head, value_strides, 0)
        means = head_start(means, sequence, head, mean_strides, 0)
        block = num_tokens // BLOCK_SIZE - 1
        sums = tl.zeros([TILE, WIDTH], tl.float32)
        for start in range(0, BLOCK_SIZE, TILE):
            slots = first_slot + block * BLOCK_SIZE + start + tokens
            tile = tl.load(
                values + slots[:, None].to(tl.int64) * value_strides[2] + dims[None, :],
                mask=(start + tokens < BLOCK_SIZE)[:, None] & in_head[None, :],
                other=0.0,
            )
            sums += tile.to(tl.float32)
        mean = tl.sum(sums, 0) / BLOCK_SIZE
        place = means + block.to(tl.int64) * mean_strides[2] + dims
        tl.store(place, mean.to(means.dtype.element_ty), mask=in_head)


def update_value_means(
    means: Tensor, values: Tensor, length: Tensor, first_slots: Tensor, block_size: int
) -> None:
    """Writes the mean of the block that the last token of each sequence completes, if it does.

    Args:
        means: [B, K, num_blocks, D], contiguous along the last dimension; written.
        values: [B, K, capacity, D], contiguous along the last dimension.
        length: int32 [1], slots in use.
        first_slots: int32 [B], slot of position 0.
        block_size: positions in a block.
    """
    batch, heads, _, head_dim = values.shape
    width = triton.next_power_of_2(head_dim)
    tile = min(triton.next_power_of_2(block_size), max(1, TILE_ELEMENTS // width))
    with torch.cuda.device_of(values):
        value_means_kernel[(heads, batch)](
            values,
            strides(values),
            means,
            strides(means),
            length,
            first_slots,
            BLOCK_SIZE=block_size,
            HEAD_DIM=head_dim,
            WIDTH=width,
            TILE=tile,
            num_warps=4,
        )

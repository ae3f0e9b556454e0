"""Tokens in blocks, and the batch of a step: what attention is given, free of vLLM's own types.

R requests, T rows of all requests together, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Pages:
    """A layer's share of a cache's blocks: views, [num_blocks, heads, block_size, dimensions]."""

    keys: Tensor
    values: Tensor
    index_keys: Tensor | None = None

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.keys.shape[2]

    def write(
        self, slots: Tensor, keys: Tensor, values: Tensor, index_keys: Tensor | None = None
    ) -> None:
        """Stores tokens.

        Args:
            slots: int64 [T], block number times block size plus place in the block. Negative ones
                belong to no request; they go to block 0, which nobody reads.
            keys: [T, heads, D].
            values: the same shape.
            index_keys: [T, retrieval heads, index_dim]; None where the pages hold none.
        """
        slots = slots.clamp(min=0)
        blocks, places = slots // self.block_size, slots % self.block_size
        self.keys[blocks, :, places] = keys
        self.values[blocks, :, places] = values
        if self.index_keys is not None and index_keys is not None:
            self.index_keys[blocks, :, places] = index_keys.to(self.index_keys.dtype)


@dataclass
class Batch:
    """A step's requests, some of which may be padding without rows, as one group's caches hold them.

    Attributes:
        starts: where each request's rows begin, R + 1 numbers.
        lengths: tokens of each request after this step, R numbers.
        prompt_lengths: of each request, R numbers: rows from there on select.
        block_table: int32 [R, blocks].
        slots: int64 [rows], where each row's token goes; negative for padding.
        device_lengths: int32 [R], the lengths where the block table is.
    """

    starts: list[int]
    lengths: list[int]
    prompt_lengths: list[int]
    block_table: Tensor
    slots: Tensor
    device_lengths: Tensor


@dataclass(frozen=True)
class LayerCache:
    """What a layer has in one group: its pages, and the batch with the group's block table."""

    pages: Pages
    batch: Batch

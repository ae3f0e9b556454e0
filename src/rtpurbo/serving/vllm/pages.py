"""Tokens in blocks, and the batch of a step: what attention is given, free of vLLM's own types.

R requests, T rows of all requests together, D head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops import KeyValueStates


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
                belong to no request: they leave zeros in block 0, which is no request's. Tiles of
                kernels may reach into it from a window, and find nothing that weights of 0 would not
                take away.
            keys: [T, heads, D].
            values: the same shape.
            index_keys: [T, retrieval heads, index_dim]; None where the pages hold none.
        """
        nobody = (slots < 0)[:, None, None]
        slots = slots.clamp(min=0)
        blocks, places = slots // self.block_size, slots % self.block_size
        for pages, states in (
            (self.keys, keys),
            (self.values, values),
            (self.index_keys, index_keys),
        ):
            if pages is not None and states is not None:
                pages[blocks, :, places] = states.masked_fill(nobody, 0).to(pages.dtype)


@dataclass(frozen=True)
class Part:
    """Heads of a layer that lie in one piece of each block.

    Attributes:
        heads: their number.
        size: elements of a token of one head.
        dtype: of the elements.
    """

    heads: int
    size: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Of all heads."""
        return self.heads * self.size * self.dtype.itemsize


def divide(blocks: Tensor, parts: Mapping[int, tuple[Part, ...]]) -> dict[int, Pages]:
    """Each layer's share of a cache's blocks.

    Args:
        blocks: [num_blocks, 1, block_size, elements], where the bytes of a block follow each other.
        parts: of each layer keys, values and perhaps index keys; they lie in a block in this order.
    """
    block_size = blocks.shape[2]
    raw = blocks.view(torch.uint8).flatten(1)
    pages, start = {}, 0
    for layer, of_layer in parts.items():
        views = []
        for part in of_layer:
            end = start + part.token_bytes * block_size
            view = raw[:, start:end].view(part.dtype)
            views.append(view.unflatten(1, (part.heads, block_size, part.size)))
            start = end
        pages[layer] = Pages(*views)
    return pages


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
        device_prompt_lengths: int32 [R], likewise; wanted where `uniform`.
        uniform: every request has one row, or none and no tokens. Tensors alone tell what is to be done,
            so that it can become a graph, to be replayed when they hold another step.
        division: what a path works out from all this once a step.
    """

    starts: list[int]
    lengths: list[int]
    prompt_lengths: list[int]
    block_table: Tensor
    slots: Tensor
    device_lengths: Tensor
    device_prompt_lengths: Tensor | None = None
    uniform: bool = False
    division: object = None

    def requests(self) -> Iterator[tuple[int, int, int, int]]:
        """Each request that has rows: its number, its first row, the one behind its last, its length."""
        for request, (start, end) in enumerate(pairwise(self.starts)):
            length = self.lengths[request]
            if start < end and end - start <= length:  # the others are padding
                yield request, start, end, length

    def num_selecting_rows(self, request: int, rule: AttentionRule) -> int:
        """How many of a request's last rows select.

        What was generated selects, whether it is computed for the first time or again after the
        request had to give its blocks back; the prompt is dense under `prefill_mode` dense, in
        whatever chunks it comes.
        """
        rows = self.starts[request + 1] - self.starts[request]
        if rule.prefill_mode != "dense":
            return rows
        return max(0, min(rows, self.lengths[request] - self.prompt_lengths[request]))


@dataclass(frozen=True)
class LayerCache:
    """What a layer has in one group: its pages, and the batch with the group's block table."""

    pages: Pages
    batch: Batch


def no_states(like: Tensor, batch_size: int) -> KeyValueStates:
    """States without heads, for so many sequences of queries [..., D]."""
    empty = like.new_empty(batch_size, 0, 0, like.shape[-1])
    positions = torch.empty(batch_size, 0, dtype=torch.int64, device=like.device)
    return KeyValueStates(empty, empty, positions)

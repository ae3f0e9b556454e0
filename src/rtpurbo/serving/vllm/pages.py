"""Paged states and the batch of a step: inputs of attention, independent of vLLM's types.

R requests, T tokens (and queries) of all requests in a step, D head_dim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops import KeyValueStates
from rtpurbo.ops.eager.heavy_hitters import OBSERVED_QUERIES, shortest_prompt

NULL_BLOCK = 0
"""Block of vLLM that belongs to no request; a block table has it where a reused prefix lacks a block."""

FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class Pages:
    """Views of one layer in the blocks of a cache, [num_blocks, heads, block_size, dimensions].

    Attributes:
        keys: in the model's dtype, or float8_e4m3fn.
        values: same.
        index_keys: as `rtpurbo.ops.states.PagedStates.index_keys`; None in windowed groups.
        key_scale: a key is the stored value times this scale; 1 unless stored as float8.
        value_scale: same for values.
    """

    keys: Tensor
    values: Tensor
    index_keys: Tensor | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.keys.shape[2]

    def write(
        self, slots: Tensor, keys: Tensor, values: Tensor, index_keys: Tensor | None = None
    ) -> None:
        """Writes tokens.

        Args:
            slots: int64 [T], block number times block size plus place in the block. Negative slots
                belong to no request; they write zeros to block 0, which belongs to none either. Tiles of
                kernels may load from it with weight 0, so it must be finite.
            keys: [T, heads, D].
            values: same shape.
            index_keys: [T, index keys, index_dim]; None if the pages have none.
        """
        is_padding = (slots < 0)[:, None, None]
        slots = slots.clamp(min=0)
        blocks, places = slots // self.block_size, slots % self.block_size
        for pages, states, scale in (
            (self.keys, keys, self.key_scale),
            (self.values, values, self.value_scale),
            (self.index_keys, index_keys, 1.0),
        ):
            if pages is None or states is None:
                continue
            states = states.masked_fill(is_padding, 0)
            if pages.dtype == torch.float8_e4m3fn:
                # Larger values become NaN in this format.
                states = (states.float() * (1 / scale)).clamp(-FLOAT8_MAX, FLOAT8_MAX)
            pages[blocks, :, places] = states.to(pages.dtype)


@dataclass(frozen=True)
class Part:
    """Contiguous part of a block: keys, values or index keys of one layer.

    Attributes:
        heads: number of heads.
        size: elements of a token of one head.
        dtype: dtype of the elements.
    """

    heads: int
    size: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of a token in all heads."""
        return self.heads * self.size * self.dtype.itemsize


def divide(blocks: Tensor, parts: Mapping[int, tuple[Part, ...]]) -> dict[int, Pages]:
    """Divides the blocks of a cache into views per layer.

    Args:
        blocks: [num_blocks, 1, block_size, elements], contiguous within each block.
        parts: keys, values and possibly index keys of each layer, in their order in a block.
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
    """Requests of a step, with the block table of one group; some may be padding without queries.

    Attributes:
        starts: int32 [R + 1] on the CPU, first query of each request and the end of the last one.
        lengths: int32 [R] on the CPU, tokens of each request after this step.
        prompt_lengths: int32 [R] on the CPU, prompt tokens of each request: later queries select.
        block_table: int32 [R, blocks].
        slots: int64 [T], slot of each token; negative for padding.
        device_lengths: int32 [R], lengths on the device.
        device_prompt_lengths: int32 [R], prompt lengths on the device; required if `uniform`.
        uniform: every request has one query, or neither queries nor tokens. Attention then depends on device
            tensors alone, so that it can be captured in a CUDA graph, and `prompt_lengths` may be on the device too.
        step_queries: queries by kernel, cached by `cuda`.
        decode_table: block table of generated tokens in a uniform step, computed by the first layer of the group.
    """

    starts: Tensor
    lengths: Tensor
    prompt_lengths: Tensor
    block_table: Tensor
    slots: Tensor
    device_lengths: Tensor
    device_prompt_lengths: Tensor | None = None
    uniform: bool = False
    step_queries: object = None
    decode_table: Tensor | None = None

    @property
    def num_queries(self) -> Tensor:
        """Queries of each request, int32 [R] on the CPU; 0 for padding."""
        num_queries = self.starts.diff()
        return num_queries * (num_queries <= self.lengths)

    def num_selecting(self, rule: AttentionRule) -> Tensor:
        """Number of last queries of each request that select, int32 [R] on the CPU.

        Generated tokens select, also when they are recomputed after a preemption. With `prefill_mode` dense, the
        prompt is dense, however it is chunked.
        """
        num_queries = self.num_queries
        if rule.prefill_mode != "dense":
            return num_queries
        return (self.lengths - self.prompt_lengths).clamp(min=0).minimum(num_queries)

    def dense_queries(self, rule: AttentionRule) -> tuple[Tensor, Tensor]:
        """Queries of each request that are dense in local heads, the last ones of its prompt.

        The windowed group has kept the blocks of their requests that are not null (see `SinkWindowManager`).

        Returns:
            Position of the first one and their number, int32 [R] on the CPU.
        """
        start, end = self.lengths - self.num_queries, self.prompt_lengths.minimum(self.lengths)
        reads = start < self.prompt_lengths
        counts = torch.zeros_like(self.prompt_lengths)
        counts[reads] = counts.new_tensor(
            [rule.num_dense_queries(length) for length in self.prompt_lengths[reads].tolist()]
        )
        first = (self.prompt_lengths - counts).maximum(start)
        # In shorter prompts, windows hold everything.
        beyond_window = self.prompt_lengths > rule.sliding_window
        return first, (end - first).clamp(min=0) * beyond_window

    def observed_queries(self, rule: AttentionRule) -> tuple[Tensor, Tensor]:
        """Queries of each request that choose its heavy hitters, of the last `OBSERVED_QUERIES` of its prompt.

        If a chunk ends among these, those of one chunk choose: the later one, unless it has fewer. Hence the last
        query of a prompt never chooses alone, which it could not in a CUDA graph.

        Returns:
            Position of the first one and their number, int32 [R] on the CPU.
        """
        start = self.lengths - self.num_queries
        earliest = self.prompt_lengths - OBSERVED_QUERIES
        first, end = earliest.maximum(start), self.prompt_lengths.minimum(self.lengths)
        count = (end - first).clamp(min=0)
        chooses = (count >= start - earliest) & (self.prompt_lengths >= shortest_prompt(rule))
        return first, count * chooses


@dataclass(frozen=True)
class LayerCache:
    """Pages of a layer in one group.

    Attributes:
        pages: pages of the layer.
        batch: batch of the step with the block table of the group.
        histograms: histogram workspace of the decode kernels, shared by the layers; None to allocate one.
        own_blocks: int32 [R, blocks], each request's own copies of the blocks with sinks that heavy hitters replace;
            None if there are none.
        is_first: the layer is the first of its group in the model.
    """

    pages: Pages
    batch: Batch
    histograms: Tensor | None = None
    own_blocks: Tensor | None = None
    is_first: bool = False


def no_states(like: Tensor, batch_size: int) -> KeyValueStates:
    """States without heads for `batch_size` sequences, in dtype, device and head_dim of `like` [..., D]."""
    empty = like.new_empty(batch_size, 0, 0, like.shape[-1])
    positions = torch.empty(batch_size, 0, dtype=torch.int64, device=like.device)
    return KeyValueStates(empty, empty, positions)

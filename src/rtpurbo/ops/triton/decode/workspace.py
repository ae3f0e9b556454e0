"""Inputs and intermediate results of a decode step: partial attention, scores, selection.

B sequences, H query heads, R retrieval heads, D head_dim, I index_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.states import HeadLayout, States
from rtpurbo.ops.triton.decode.histogram import LEVELS
from rtpurbo.ops.triton.device_functions import LOG2_E

# Index keys that one program scores.
CHUNK_TOKENS = 1024
# Programs that compact the selected entries of a head or group, and the fewest entries of one of them.
SEGMENTS = 256
MIN_SEGMENT_ENTRIES = 256
MIN_GROUP_SEGMENT_ENTRIES = 512
# Retrieval heads of a KV head read their selected keys together if there are at least so many of them for each KV head
# on average (with fewer, it costs more than it saves), and no more than a tile of tensor cores holds.
MEAN_MEMBERS = 2
MAX_MEMBERS = 16
# Elements of a tile that four warps hold in registers without spilling.
TILE_ELEMENTS = 16384


@dataclass(frozen=True)
class DecodeStep:
    """Inputs of a decode step, as its kernels address them.

    Attributes:
        queries: [B, H, 1, D].
        full: cache of the full KV heads.
        windowed: cache of the windowed KV heads: slots in any order, or pages.
        layout: query heads by kind.
        index_queries: [B, R, 1, I]; None without retrieval heads.
        rule: windows and selection.
        scaling: factor on the dot products.
    """

    queries: Tensor
    full: States
    windowed: States
    layout: HeadLayout
    index_queries: Tensor | None
    rule: AttentionRule
    scaling: float

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.queries.shape[0]

    @property
    def num_retrieval(self) -> int:
        """Number of retrieval heads of a sequence."""
        return len(self.layout.retrieval)

    @property
    def groups(self) -> SelectionGroups:
        """Retrieval heads whose selected keys are in one list."""
        return SelectionGroups.of(self.layout)


@dataclass(frozen=True)
class SelectionGroups:
    """Retrieval heads whose selected keys are in one list: those of a KV head, or each on its own.

    Attributes:
        members: largest number of heads of a group; 1 if each retrieval head is on its own.
        count: number of groups of a sequence.
        ranks: int64 [count, members], retrieval heads of each group, -1 for none; None if each is on its own.
    """

    members: int
    count: int
    ranks: Tensor | None

    @classmethod
    def of(cls, layout: HeadLayout) -> SelectionGroups:
        """Groups of a layer's retrieval heads."""
        count, members = layout.retrieval_groups.shape
        if members <= MAX_MEMBERS and len(layout.retrieval) >= MEAN_MEMBERS * count > 0:
            return cls(members, count, layout.retrieval_groups)
        return cls(1, len(layout.retrieval), None)

    @property
    def width(self) -> int:
        """Power of two that the members are padded to."""
        return triton.next_power_of_2(self.members)


@dataclass(frozen=True)
class PartialAttention:
    """Split-K partial results: attention of some heads, each over splits of its keys.

    Attributes:
        log_sums: fp32 [heads, splits], log-sum-exp to base 2.
        outputs: fp32 [heads, splits, D].
        max_splits: largest number of splits of any batch size.
    """

    log_sums: Tensor
    outputs: Tensor
    max_splits: int

    @classmethod
    def allocate(cls, like: Tensor, heads: int, splits: int, max_splits: int) -> PartialAttention:
        """Uninitialised partial results with the head_dim and device of `like`."""
        return cls(
            like.new_empty(heads, splits, dtype=torch.float32),
            like.new_empty(heads, splits, like.shape[-1], dtype=torch.float32),
            max_splits,
        )

    def __len__(self) -> int:
        return self.log_sums.shape[1]

    def with_sinks(self, sinks: Tensor) -> PartialAttention:
        """The same with one more split per head: a learned sink [H], whose output is zero."""
        batch = self.log_sums.shape[0] // sinks.numel()
        logits = (sinks.float() * LOG2_E.value).repeat(batch)[:, None]
        return PartialAttention(
            torch.cat([self.log_sums, logits], 1),
            torch.nn.functional.pad(self.outputs, (0, 0, 0, 1)),
            self.max_splits + 1,
        )


@dataclass(frozen=True)
class IndexScores:
    """Quantised index scores of the far keys, and the sizes that the launches share.

    An *entry* is the unit of selection: a token, or a block of tokens.

    Attributes:
        levels: int16 [planes * B * R, entries], scores quantised as in `histogram`; `entries` is padded
            to whole segments and chunks.
        histogram: int32 [planes * B * R, LEVELS], number of entries per level; zeros before the step.
        references: fp32 [B * R], score that the levels are relative to.
        num_chunks: programs that score the entries of a head.
        segment: entries that one program of the selection compacts.
        block: tokens of an entry.
        planes: 2 if window keys are scored too (reading `paper`), else 1.
    """

    levels: Tensor
    histogram: Tensor
    references: Tensor
    num_chunks: int
    segment: int
    block: int
    planes: int

    @classmethod
    def allocate(cls, step: DecodeStep, heads: int) -> IndexScores:
        """Memory for `heads` retrieval heads (of all sequences), each over the capacity of the cache."""
        rule, like = step.rule, step.queries
        block = rule.block_size if rule.granularity == "block" else 1
        planes = 2 if rule.reading == "paper" else 1
        num_entries = triton.cdiv(step.full.capacity, block)
        chunk = entries_per_chunk(block)
        share = triton.next_power_of_2(triton.cdiv(num_entries, SEGMENTS))
        fewest = MIN_GROUP_SEGMENT_ENTRIES if step.groups.members > 1 else MIN_SEGMENT_ENTRIES
        segment = max(fewest, share)
        width = max(chunk, segment)
        padded_entries = triton.cdiv(num_entries, width) * width
        histogram = step.full.histogram_workspace
        if histogram is None or histogram.shape[0] != planes * heads:
            histogram = zero_histograms(planes * heads, like.device)
        return cls(
            levels=like.new_empty(planes * heads, padded_entries, dtype=torch.int16),
            histogram=histogram,
            references=like.new_empty(heads, dtype=torch.float32),
            num_chunks=triton.cdiv(num_entries, chunk),
            segment=segment,
            block=block,
            planes=planes,
        )


@dataclass(frozen=True)
class Selection:
    """Selected far keys of a step, as compacted lists of entries.

    Attributes:
        lists: int32 [B, groups, segments, length], entries: tokens, or blocks of `block` tokens.
        list_lengths: int32 [B, groups, segments], valid entries of each list.
        members: int32 like `lists`, bit m: the entry is selected by member m of the group; some zeros follow a list.
            None if each retrieval head is on its own.
        groups: groups of the retrieval heads.
        block: tokens of an entry.
    """

    lists: Tensor
    list_lengths: Tensor
    members: Tensor | None
    groups: SelectionGroups
    block: int

    def keys(self, num_positions: int) -> Tensor:
        """Mask of the tokens in the selected entries, bool [B, R, num_positions]; may include window keys."""
        valid = torch.arange(self.lists.shape[-1], device=self.lists.device)
        valid = valid < self.list_lengths[..., None]
        num_entries = self.lists.shape[2] * self.lists.shape[3]
        # The unused tail of a list is uninitialised: it is scattered to an extra entry.
        entries = self.lists.masked_fill(~valid, num_entries).flatten(2).long()
        members = torch.ones_like(self.lists) if self.members is None else self.members
        selected = torch.zeros(
            *entries.shape[:2], num_entries + 1, dtype=torch.int32, device=entries.device
        ).scatter_(2, entries, members.flatten(2))
        if self.groups.ranks is None:
            by_head = selected != 0
        else:
            ranks = self.groups.ranks.flatten()
            places = ranks.argsort()[(ranks < 0).sum() :]
            bits = (places % self.groups.members)[:, None]
            by_head = (selected[:, places // self.groups.members] >> bits) & 1 != 0
        return by_head[..., :-1].repeat_interleave(self.block, 2)[..., :num_positions]


def zero_histograms(heads: int, device: torch.device) -> Tensor:
    """Zeros int32 [heads, LEVELS], the histogram workspace of `heads` retrieval heads of all sequences."""
    return torch.zeros(heads, LEVELS.value, dtype=torch.int32, device=device)


def entries_per_chunk(block: int) -> int:
    """Entries of `block` tokens that one program scores."""
    return max(1, CHUNK_TOKENS // triton.next_power_of_2(block))


def cache_arguments(states: States) -> tuple[Any, ...]:
    """Kernel arguments: keys, key strides, values, value strides, block table, table stride."""
    keys, values = states.keys, states.values
    table = states.block_table, states.table_stride
    return keys, strides(keys), values, strides(values), *table


def gathered_tile(queries: Tensor, largest: int) -> int:
    """Keys of a tile of selected keys, `largest` at most."""
    width = triton.next_power_of_2(queries.shape[-1])
    return max(16, min(largest, TILE_ELEMENTS // queries.element_size() // width))


def strides(states: Tensor | None) -> tuple[int, int, int]:
    """Strides of the first three dimensions; zeros for None."""
    if states is None:
        return 0, 0, 0
    outer, head, slot = states.stride()[:3]
    return outer, head, slot

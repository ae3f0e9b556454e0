"""Inputs of the operators: KV caches, the layout of the heads, selection statistics, and all of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule


@dataclass
class KeyValueStates:
    """Keys and values of some KV heads, with the position of each key.

    Visibility follows from the positions, not from the place in the tensor, so ring buffers, left padding and
    plain sequences need no special cases.

    Attributes:
        keys: [batch, num_key_value_heads, k_len, head_dim], after RoPE.
        values: the same shape (the last size may differ).
        positions: int64 [batch, k_len], 0 for the first real token of a sequence, -1 for padding
            and for empty slots.
        index_keys: [batch, num_index_keys, k_len, index_dim], one per retrieval head, or one per KV head that
            its retrieval heads share (`index_key_heads`); None without retrieval heads.
        in_order: positions are 0..k_len-1 in every sequence, so that a dense kernel needs no mask.
        first_slots: int32 [batch], the key at position p is in slot p + first_slots, as with left padding or
            in a chunk after a ring buffer (see `sink_slots`). None if keys may be in any order; implied 0
            with `in_order`.
        sink_slots: int32 [batch], slot of position 0 if sinks are stored apart, as in a ring buffer; None if
            `first_slots` holds for them too.
        length: int32 [1], slots in use of a static cache, on the device, so that a decode step has the same
            shape at any length; None if all are in use. The last ones in use are the queries' own keys.
        histogram_workspace: from `new_histogram_workspace`, zeros before and after each decode step; None to
            allocate one in each step, which costs a launch.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    index_keys: Tensor | None = None
    in_order: bool = False
    first_slots: Tensor | None = None
    sink_slots: Tensor | None = None
    length: Tensor | None = None
    histogram_workspace: Tensor | None = None

    block_table: ClassVar[None] = None
    page_size: ClassVar[int] = 0
    table_stride: ClassVar[int] = 0

    @property
    def capacity(self) -> int:
        """Slots of a sequence."""
        return self.keys.shape[2]

    @property
    def lengths(self) -> Tensor | None:
        """Slots in use, as of paged states: `length`."""
        return self.length

    def query_starts(self, q_len: int) -> Tensor:
        """Position of the first of the last `q_len` queries, int32 [batch]; negative within padding."""
        batch, k_len, device = self.keys.shape[0], self.keys.shape[2], self.keys.device
        if self.length is not None:
            starts = (self.length - q_len).expand(batch)
        else:
            starts = torch.full((batch,), k_len - q_len, dtype=torch.int32, device=device)
        return starts if self.first_slots is None else starts - self.first_slots

    def tokens(self, rows: slice | Tensor) -> KeyValueStates:
        """The states of some tokens only, of a range or by indices."""
        return replace(
            self,
            keys=self.keys[:, :, rows],
            values=self.values[:, :, rows],
            positions=self.positions[:, rows],
            index_keys=None if self.index_keys is None else self.index_keys[:, :, rows],
        )


def check_states(query_states: Tensor, query_positions: Tensor, states: KeyValueStates) -> None:
    """Checks that the shapes of queries and states fit.

    Raises:
        ValueError: they do not.
    """
    batch, _, q_len, head_dim = query_states.shape
    if query_positions.shape != (batch, q_len):
        raise ValueError(
            f"query_positions are {tuple(query_positions.shape)}, but must be {(batch, q_len)}."
        )
    if states.keys.shape[0] != batch or states.keys.shape[-1] != head_dim:
        raise ValueError(
            f"keys {tuple(states.keys.shape)} do not fit queries {tuple(query_states.shape)}: "
            "batch and head_dim must be equal."
        )
    if states.positions.shape != (batch, states.keys.shape[2]):
        raise ValueError(
            f"key positions are {tuple(states.positions.shape)}, "
            f"but must be {(batch, states.keys.shape[2])}."
        )


@dataclass(frozen=True)
class PagedStates:
    """Paged KV cache of a batch whose sequences differ in length.

    The token at position p of sequence b is in slot p % page_size of page `block_table[b, p // page_size]`.
    There is no padding: sequence b has `lengths[b]` tokens, and the query of a decode step is the last one.
    Kernels read the same attributes as those of `KeyValueStates`; here slots equal positions.

    Attributes:
        keys: [num_pages, num_key_value_heads, page_size, head_dim], after RoPE, in the dtype of the queries or
            float8_e4m3fn. Scales of float8 are the caller's: that of keys is part of the factor on the dot products,
            that of values a factor on the output.
        values: the same shape and dtype.
        block_table: int32 [batch, max_pages], contiguous per sequence; entries beyond its end are not read.
        lengths: int32 [batch]; 0 for an unused entry of the batch.
        index_keys: [num_pages, num_index_keys, page_size, index_dim], as `KeyValueStates.index_keys`;
            None without retrieval heads.
        histogram_workspace: as `KeyValueStates.histogram_workspace`.
    """

    keys: Tensor
    values: Tensor
    block_table: Tensor
    lengths: Tensor
    index_keys: Tensor | None = None
    histogram_workspace: Tensor | None = None

    positions: ClassVar[None] = None
    first_slots: ClassVar[None] = None
    sink_slots: ClassVar[None] = None

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.keys.shape[2]

    @property
    def capacity(self) -> int:
        """Maximum tokens per sequence, by the size of the block table."""
        return self.block_table.shape[1] * self.page_size

    @property
    def table_stride(self) -> int:
        """Elements between the block tables of two sequences."""
        return self.block_table.stride(0)

    def query_starts(self, q_len: int) -> Tensor:
        """Position of the first of the last `q_len` queries, int32 [batch]."""
        return self.lengths - q_len


States = KeyValueStates | PagedStates


def index_key_heads(
    index_keys: Tensor, num_key_value_heads: int, key_value_heads: Tensor
) -> Tensor | None:
    """Index along dim 1 of the index keys for each retrieval head.

    Args:
        index_keys: [batch or pages, num_index_keys, length, index_dim].
        num_key_value_heads: KV heads of the same states.
        key_value_heads: int [num_retrieval_heads], KV head index of each retrieval head.

    Returns:
        `key_value_heads` if index keys are shared, or None if each retrieval head has its own.

    Raises:
        ValueError: the number of index keys is neither that of the retrieval heads nor of the KV heads.
    """
    count, num_retrieval_heads = index_keys.shape[1], key_value_heads.numel()
    if count == num_retrieval_heads:
        return None
    if count == num_key_value_heads:
        return key_value_heads
    raise ValueError(
        f"index keys have {count} heads: expected {num_retrieval_heads} (one per retrieval head) or "
        f"{num_key_value_heads} (one per KV head)."
    )


@dataclass(frozen=True)
class HeadGroup:
    """Query heads with the KV head index of each.

    Attributes:
        heads: int64 [num_heads], query heads of the layer.
        key_value_heads: int64 [num_heads], indices along dim 1 of `KeyValueStates.keys`.
    """

    heads: Tensor
    key_value_heads: Tensor

    def __len__(self) -> int:
        return self.heads.numel()


@dataclass(frozen=True)
class HeadLayout:
    """Partition of a layer's query heads into retrieval and local heads, and of its KV heads into full and windowed.

    Attributes:
        retrieval: retrieval heads; their KV heads are full.
        local_full: local heads whose KV head is full because another query head of the group retrieves.
        local_windowed: local heads whose KV head keeps only sinks and window.
        full_key_value_heads: int64, KV heads that keep every token.
        windowed_key_value_heads: int64, the other KV heads.
        retrieval_groups: int64 [full KV heads, most], indices in `retrieval` of the retrieval heads of each full
            KV head, in ascending order; padded with -1 to the largest number of them.
        order: int64 [num_attention_heads], permutation from (retrieval, local_full, local_windowed) to
            head order.
        derived: values that backends compute from the layout once.
    """

    retrieval: HeadGroup
    local_full: HeadGroup
    local_windowed: HeadGroup
    full_key_value_heads: Tensor
    windowed_key_value_heads: Tensor
    retrieval_groups: Tensor
    order: Tensor
    derived: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def build(
        cls,
        retrieval_heads: Sequence[int],
        num_attention_heads: int,
        num_key_value_heads: int,
        device: torch.device | str = "cpu",
    ) -> HeadLayout:
        """Layout of a layer with the given retrieval heads."""
        group = num_attention_heads // num_key_value_heads
        full = sorted({head // group for head in retrieval_heads})
        windowed = [head for head in range(num_key_value_heads) if head not in full]
        local = [head for head in range(num_attention_heads) if head not in set(retrieval_heads)]

        def indices(values: Sequence[Any]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        def group_of(heads: Sequence[int], kept: list[int]) -> HeadGroup:
            return HeadGroup(indices(heads), indices([kept.index(head // group) for head in heads]))

        members = [
            [rank for rank, head in enumerate(retrieval_heads) if head // group == kept]
            for kept in full
        ]
        most = max(map(len, members), default=0)
        groups = [[*ranks, *[-1] * (most - len(ranks))] for ranks in members]
        local_full = [head for head in local if head // group in full]
        local_windowed = [head for head in local if head // group in windowed]
        joined = torch.tensor([*retrieval_heads, *local_full, *local_windowed])
        return cls(
            group_of(retrieval_heads, full),
            group_of(local_full, full),
            group_of(local_windowed, windowed),
            indices(full),
            indices(windowed),
            indices(groups).view(len(full), most),
            joined.argsort().to(device),
        )


@cache
def uniform_layout(
    num_attention_heads: int, num_key_value_heads: int, device: torch.device, *, retrieves: bool
) -> HeadLayout:
    """Layout of a layer whose heads all retrieve, or are all local."""
    heads = range(num_attention_heads) if retrieves else ()
    # Kept across calls, so created outside of inference mode.
    with torch.inference_mode(False):
        return HeadLayout.build(heads, num_attention_heads, num_key_value_heads, device)


@dataclass(frozen=True)
class SelectionQueries:
    """Queries of retrieval heads with the inputs of their selection.

    Attributes:
        query_states: [batch, heads, queries, head_dim], after RoPE.
        key_states: [batch, heads, k_len, head_dim], keys of each query head.
        query_positions: int64 [batch, queries], -1 for padding.
        key_positions: int64 [batch, k_len], -1 for empty slots.
        logits: exact attention logits [batch, heads, queries, k_len], in at least fp32.
        near: bool [batch, 1, queries, k_len], sinks and window, which are always read.
        far: bool [batch, 1, queries, k_len], all other visible keys.
        score_index: computes the index scores, an estimate of the logits of the same shape.
    """

    query_states: Tensor
    key_states: Tensor
    query_positions: Tensor
    key_positions: Tensor
    logits: Tensor
    near: Tensor
    far: Tensor
    score_index: Callable[[], Tensor]


Selector = Callable[[SelectionQueries], Tensor]
"""Selection of far keys that replaces that of the rule: bool [batch, heads, queries, k_len]."""


@dataclass
class SelectionStatistics:
    """Number of far keys that retrieval heads read, over all queries that select by the indexer.

    Attributes:
        far_keys: far keys (neither sink nor window) that a dense head would have read, summed over
            queries.
        far_keys_read: selected ones of them.
        queries: queries (times heads) with far keys.
        needs_queries: a subclass needs the logits of the queries (`add_queries`), which kernels do not
            materialise: calls that select then use the eager backend.
    """

    far_keys: float = 0.0
    far_keys_read: float = 0.0
    queries: int = 0
    needs_queries: bool = False

    def add_queries(self, queries: SelectionQueries, selected: Tensor) -> None:
        """Adds queries of the eager backend with their selection: bool [batch, heads, queries, k_len]."""
        self.add(queries.far, selected)

    def add(self, far: Tensor, selected: Tensor) -> None:
        """Adds queries: bool `far` [batch, 1, queries, k_len], `selected` [batch, heads, queries, k_len]."""
        heads = selected.shape[1]
        self.add_counts(
            float(far.sum()) * heads, float(selected.sum()), int(far.any(-1).sum()) * heads
        )

    def add_counts(self, far_keys: float, far_keys_read: float, queries: int) -> None:
        """Adds precomputed counts; see the attributes."""
        self.far_keys += far_keys
        self.far_keys_read += far_keys_read
        self.queries += queries

    @property
    def share_read(self) -> float | None:
        """Share of the far keys that was read; None without far keys."""
        return self.far_keys_read / self.far_keys if self.far_keys else None


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of `headwise_attention`, as every backend receives them.

    The last queries, which have index queries (see `AttentionRule.num_selecting_queries`), select in retrieval
    heads; the queries before them are dense.

    Attributes:
        query_states: [batch, num_attention_heads, q_len, head_dim], after RoPE.
        query_positions: int64 [batch, q_len], -1 for padding.
        full: states of the full KV heads, with index keys of the retrieval heads.
        windowed: states of the windowed KV heads, at least sinks and the last W keys.
        layout: query heads by kind.
        index_queries: [batch, num_retrieval_heads, selecting queries, index_dim] of the last queries, or
            None if no query selects.
        rule: windows and selection.
        scaling: factor on the dot products.
        statistics: accumulates the selected keys.
        return_log_sum_exp: also return the log-sum-exp.
        selector: selects the far keys in place of the rule.
        sinks: learned sinks [num_attention_heads] (gpt-oss): logits in the denominator of every softmax and
            in the near mass of the selection.
        dense_queries: queries for which local heads read every key (see `AttentionRule.num_dense_queries`), up to
            which the windowed KV heads have all keys.
    """

    query_states: Tensor
    query_positions: Tensor
    full: KeyValueStates
    windowed: KeyValueStates
    layout: HeadLayout
    index_queries: Tensor | None
    rule: AttentionRule
    scaling: float
    statistics: SelectionStatistics | None = None
    return_log_sum_exp: bool = False
    selector: Selector | None = None
    sinks: Tensor | None = None
    dense_queries: slice | None = None

    @property
    def local_groups(self) -> list[tuple[HeadGroup, KeyValueStates]]:
        """Groups of local heads that are not empty, with their states."""
        groups = (self.layout.local_full, self.full), (self.layout.local_windowed, self.windowed)
        return [(group, states) for group, states in groups if len(group)]

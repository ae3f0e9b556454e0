"""What the operators take beside queries: keys with positions, and who reads which of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class KeyValueStates:
    """Keys and values of some KV heads, each key labelled with its position.

    The label, not the place in the tensor, decides what a query sees: so a ring buffer, left
    padding and a plain sequence are one case.

    Attributes:
        keys: [batch, num_key_value_heads, k_len, head_dim], after RoPE.
        values: the same shape (the last size may differ).
        positions: int64 [batch, k_len], 0 for the first real token of a sequence, -1 for padding
            and for slots that hold nothing.
        index_keys: [batch, num_index_keys, k_len, index_dim], one for each retrieval head, or one for
            each of the KV heads, which its retrieval heads share (`index_key_heads`); None where
            nothing retrieves.
        in_order: positions are 0..k_len-1 in every row, which lets a dense kernel skip the mask.
        first_slots: int32 [batch], where the slots run on with the positions: the key at position p
            lies in slot p + first_slots. So it is with left padding, and in a chunk behind a ring
            (`sink_slots`). None if keys may lie anywhere; zero is meant where `in_order` is set.
        sink_slots: int32 [batch], the slot of position 0 where sinks are kept apart, as a ring does;
            None if they lie where `first_slots` says.
        length: int32 [1], how many slots are in use where the tensors are larger than that, so that a
            decoding step has one shape at any length; None if all are. The queries' own keys are the
            last ones in use.
        counters: what decoding steps of kernels count in, zeros before and after each
            (`decoding_counters`); None: a step makes its own, which takes a launch.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    index_keys: Tensor | None = None
    in_order: bool = False
    first_slots: Tensor | None = None
    sink_slots: Tensor | None = None
    length: Tensor | None = None
    counters: Tensor | None = None

    def without_last(self, count: int) -> KeyValueStates:
        """The same without the last `count` keys of the tensor."""
        end = self.keys.shape[2] - count
        return replace(
            self,
            keys=self.keys[:, :, :end],
            values=self.values[:, :, :end],
            positions=self.positions[:, :end],
            index_keys=None if self.index_keys is None else self.index_keys[:, :, :end],
        )


def index_key_heads(
    index_keys: Tensor, num_key_value_heads: int, key_value_heads: Tensor
) -> Tensor | None:
    """The entry along dim 1 of the index keys that each retrieval head reads.

    Args:
        index_keys: [batch or pages, num_index_keys, length, index_dim].
        num_key_value_heads: KV heads of the states that hold them.
        key_value_heads: int [num_retrieval_heads], which of these KV heads each retrieval head reads.

    Returns:
        `key_value_heads` if index keys are shared, or None if each retrieval head has its own.

    Raises:
        ValueError: there are neither as many index keys as retrieval heads nor as KV heads.
    """
    count, num_retrieval_heads = index_keys.shape[1], key_value_heads.numel()
    if count == num_retrieval_heads:
        return None
    if count == num_key_value_heads:
        return key_value_heads
    raise ValueError(
        f"there are index keys of {count} heads, but must be of {num_retrieval_heads} retrieval heads "
        f"or of {num_key_value_heads} KV heads."
    )


@dataclass(frozen=True)
class HeadGroup:
    """Some query heads, and for each the KV head it reads, counted within the states it is given.

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
    """How a layer's query heads divide: who retrieves, who is local, and whose keys are kept whole.

    Attributes:
        retrieval: retrieval heads, reading full KV heads.
        local_full: local heads whose KV head is full because a neighbour in the group retrieves.
        local_bounded: local heads whose KV head is kept as sinks and window alone.
        full_key_value_heads: int64, KV heads kept whole.
        windowed_key_value_heads: int64, the others.
        order: int64 [num_attention_heads], brings (retrieval, local_full, local_bounded) back to
            head order.
        derived: what a backend works out from the layout once.
    """

    retrieval: HeadGroup
    local_full: HeadGroup
    local_bounded: HeadGroup
    full_key_value_heads: Tensor
    windowed_key_value_heads: Tensor
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
        """The layout of a layer with these retrieval heads."""
        group = num_attention_heads // num_key_value_heads
        full = sorted({head // group for head in retrieval_heads})
        bounded = [head for head in range(num_key_value_heads) if head not in full]
        local = [head for head in range(num_attention_heads) if head not in set(retrieval_heads)]

        def indices(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        def heads_reading(heads: Sequence[int], kept: list[int]) -> HeadGroup:
            return HeadGroup(indices(heads), indices([kept.index(head // group) for head in heads]))

        local_full = [head for head in local if head // group in full]
        local_bounded = [head for head in local if head // group in bounded]
        joined = torch.tensor([*retrieval_heads, *local_full, *local_bounded])
        return cls(
            heads_reading(retrieval_heads, full),
            heads_reading(local_full, full),
            heads_reading(local_bounded, bounded),
            indices(full),
            indices(bounded),
            joined.argsort().to(device),
        )


@dataclass(frozen=True)
class SelectionRows:
    """Query rows of retrieval heads that are about to choose their far keys, and all they know.

    Attributes:
        query_states: [batch, heads, rows, head_dim], after RoPE.
        key_states: [batch, heads, k_len, head_dim], the keys that each query head reads.
        query_positions: int64 [batch, rows], -1 for padding.
        key_positions: int64 [batch, k_len], -1 where there is no key.
        logits: exact attention logits [batch, heads, rows, k_len], in at least fp32.
        near: bool [batch, 1, rows, k_len], sinks and window: read in any case.
        far: bool [batch, 1, rows, k_len], the other keys that the rows may see.
        score_index: gives the indexer's estimate of the logits, the same shape.
    """

    query_states: Tensor
    key_states: Tensor
    query_positions: Tensor
    key_positions: Tensor
    logits: Tensor
    near: Tensor
    far: Tensor
    score_index: Callable[[], Tensor]


Selector = Callable[[SelectionRows], Tensor]
"""Chooses far keys in another way than the rule does: bool [batch, heads, rows, k_len]."""


@dataclass
class SelectionStatistics:
    """Counts what retrieval heads read, over every row whose keys were selected by the indexer.

    Attributes:
        far_keys: far keys (neither sink nor window) that a dense head would have read, summed over
            rows.
        far_keys_read: those that the selection let through.
        rows: rows that had far keys.
        needs_rows: whether a subclass wants to see rows with their logits (`add_rows`), which kernels
            do not have: calls that select then run eager.
    """

    far_keys: float = 0.0
    far_keys_read: float = 0.0
    rows: int = 0
    needs_rows: bool = False

    def add_rows(self, rows: SelectionRows, selected: Tensor) -> None:
        """Adds rows that ran eager, with what they selected: bool [batch, heads, rows, k_len]."""
        self.add(rows.far, selected)

    def add(self, far: Tensor, selected: Tensor) -> None:
        """Adds rows: bool `far` [batch, 1, rows, k_len], `selected` [batch, heads, rows, k_len]."""
        heads = selected.shape[1]
        self.add_counts(
            float(far.sum()) * heads, float(selected.sum()), int(far.any(-1).sum()) * heads
        )

    def add_counts(self, far_keys: float, far_keys_read: float, rows: int) -> None:
        """Adds what was counted elsewhere; see the attributes."""
        self.far_keys += far_keys
        self.far_keys_read += far_keys_read
        self.rows += rows

    @property
    def share_read(self) -> float | None:
        """Share of the far keys read; None if no row had any."""
        return self.far_keys_read / self.far_keys if self.far_keys else None

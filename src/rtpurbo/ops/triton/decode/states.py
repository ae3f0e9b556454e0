"""What a decoding step reads and leaves: full KV heads in either form, scratch memory, selections.

B sequences, R retrieval heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rtpurbo.ops.paged import PagedStates
from rtpurbo.ops.states import KeyValueStates


@dataclass(frozen=True)
class FullStates:
    """The full KV heads as kernels see them, in one tensor or in pages.

    Attributes:
        keys: [B, full KV heads, capacity, D], or [pages, full KV heads, page_size, D].
        values: likewise.
        index_keys: [B, R, capacity, I], or [pages, R, page_size, I], or with full KV heads for R if
            index keys are shared; None if nothing retrieves.
        capacity: slots of a sequence.
        lengths: int32 [1], slots in use, or [B] with pages; None if all are.
        first_slots: int32 [B], the slot of position 0; None for 0.
        block_table: int32 [B, max_pages], or None.
        page_size: 0 without pages.
        counters: int32 [B * R, LEVELS], zeros before and after a step; None: it makes its own.
    """

    keys: Tensor
    values: Tensor
    index_keys: Tensor | None
    capacity: int
    lengths: Tensor | None
    first_slots: Tensor | None
    block_table: Tensor | None = None
    page_size: int = 0
    counters: Tensor | None = None

    @classmethod
    def of_states(cls, states: KeyValueStates) -> FullStates:
        """Those of a cache with one tensor for all."""
        return cls(
            states.keys,
            states.values,
            states.index_keys,
            states.keys.shape[2],
            states.length,
            states.first_slots,
            counters=states.counters,
        )

    @classmethod
    def of_pages(cls, states: PagedStates) -> FullStates:
        """Those of a paged cache."""
        return cls(
            states.key_pages,
            states.value_pages,
            states.index_pages,
            states.capacity,
            states.lengths,
            None,
            states.block_table,
            states.page_size,
        )

    def query_positions(self, batch: int) -> Tensor:
        """Position of each sequence's last token, int [B]."""
        lengths = self.lengths
        if lengths is None:
            lengths = torch.full((1,), self.capacity, device=self.keys.device)
        positions = lengths.expand(batch) - 1
        return positions if self.first_slots is None else positions - self.first_slots


@dataclass(frozen=True)
class Selection:
    """What a step selected, in the form the kernels left it.

    Attributes:
        lists: int32 [B, R, segments, length], entries: tokens, or blocks of `block` tokens.
        list_lengths: int32 [B, R, segments], how many entries of each list count.
        block: tokens of an entry.
    """

    lists: Tensor
    list_lengths: Tensor
    block: int

    def keys(self, num_positions: int) -> Tensor:
        """The tokens of the selected entries, bool [B, R, num_positions]; some may not be far."""
        filled = torch.arange(self.lists.shape[-1], device=self.lists.device)
        filled = filled < self.list_lengths[..., None]
        num_entries = self.lists.shape[2] * self.lists.shape[3]
        # Unused places of the lists, which hold anything, go to an entry of their own.
        entries = self.lists.masked_fill(~filled, num_entries).flatten(2).long()
        selected = torch.zeros(
            *entries.shape[:2], num_entries + 1, dtype=torch.bool, device=entries.device
        ).scatter_(2, entries, True)
        return selected[..., :-1].repeat_interleave(self.block, 2)[..., :num_positions]

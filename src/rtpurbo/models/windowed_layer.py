"""The cache of a layer that keeps the window that the model gave it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from rtpurbo.models.slots import TokenSlots


class WindowedLayer(DynamicSlidingWindowLayer):
    """As transformers', but while slots are fixed its keys are a ring of one slot a window's key.

    The token of slot s lies in slot s % window of the ring; `TokenSlots.window_mask` tells which
    hold anything.

    Args:
        slots: where the tokens of the cache lie.
        sliding_window: keys that a query of this layer sees.
    """

    keys: Any
    values: Any
    cumulative_length: int

    def __init__(self, slots: TokenSlots, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.slots = slots
        self.ring: tuple[Tensor, Tensor] | None = None

    @property
    def _is_ring(self) -> bool:
        return self.ring is not None and self.keys is self.ring[0]

    def make_static(self, capacity: int = 0) -> None:
        """Turns keys and values into rings of fixed size, that of the window."""
        if not self.is_initialized or self._is_ring:
            return
        held = self._held_slots()
        if self.ring is None or self.ring[0].shape[0] != self.keys.shape[0]:
            keys, values = (
                part.new_zeros(*part.shape[:2], self.sliding_window, part.shape[3])
                for part in (self.keys, self.values)
            )
            self.ring = keys, values
        for ring, part in zip(self.ring, (self.keys, self.values), strict=True):
            ring[:, :, held] = part[:, :, part.shape[2] - held.numel() :]
        self.keys, self.values = self.ring

    def _held_slots(self) -> Tensor:
        """Slots of the ring for the tokens that the next ones still see, in their order."""
        seen = self.cumulative_length
        first = max(0, seen - self.sliding_window + 1)
        return torch.arange(first, seen, device=self.keys.device) % self.sliding_window

    def _make_dynamic(self) -> None:
        if self._is_ring:
            held = self._held_slots()
            self.keys, self.values = self.keys[:, :, held], self.values[:, :, held]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Adds tokens and returns what their queries see, and perhaps more (masks tell)."""
        if self.slots.newest is not None and self._is_ring:
            slot = self.slots.newest % self.sliding_window
            self.keys.index_copy_(2, slot, key_states)
            self.values.index_copy_(2, slot, value_states)
            self.cumulative_length += 1
            return self.keys, self.values
        self._make_dynamic()
        states = super().update(key_states, value_states, *args, **kwargs)
        if self.slots.is_fixed:
            self.make_static()
        return states

    def activate_past_recording(self) -> None:
        """Keeps what leaves the window, until `crop`: not with fixed slots."""
        self._make_dynamic()
        self.slots.release()
        super().activate_past_recording()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """As transformers': a ring that is full cannot be cropped either."""
        was_ring = self._is_ring
        self._make_dynamic()
        try:
            super().crop(*args, **kwargs)
        finally:
            if was_ring:
                self.make_static()

    def reset(self) -> None:
        """Forgets everything and frees its memory."""
        # Not as transformers', which up to 5.19 keeps tensors of the batch that was.
        self.ring = self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in a new order, for beam search; a ring keeps its address."""
        if not self._is_ring:
            super().reorder_cache(beam_idx)
            return
        for part in (self.keys, self.values):
            part.copy_(part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._make_dynamic()
        super().batch_repeat_interleave(repeats)
        if self.slots.is_fixed:
            self.make_static()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self._make_dynamic()
        super().batch_select_indices(indices)
        if self.slots.is_fixed:
            self.make_static()

    def recount(self, seen: int) -> None:
        """Follows what the device has done on its own: this many tokens were seen."""
        self.cumulative_length = seen

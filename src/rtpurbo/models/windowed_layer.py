"""Cache of a layer that is not converted and has a sliding window of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from rtpurbo.models.slots import TokenSlots


class WindowedLayer(DynamicSlidingWindowLayer):
    """Sliding-window layer of transformers whose keys are a ring buffer while slots are fixed.

    The token of slot s is in slot s % window of the ring; `TokenSlots.window_positions` marks empty slots.
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
        """Returns the slots in the ring of the tokens that later ones still read, oldest first."""
        seen = self.cumulative_length
        first = max(0, seen - self.sliding_window + 1)
        return torch.arange(first, seen, device=self.keys.device) % self.sliding_window

    def _make_dynamic(self) -> None:
        if self._is_ring:
            held = self._held_slots()
            self.keys, self.values = self.keys[:, :, held], self.values[:, :, held]

    @contextmanager
    def _dynamic(self) -> Iterator[None]:
        """Keeps keys and values as transformers does inside a `with` block, and in rings again afterwards."""
        self._make_dynamic()
        try:
            yield
        finally:
            if self.slots.is_fixed:
                self.make_static()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends tokens and returns the keys and values of their queries, and masked ones."""
        if self.slots.newest is not None and self._is_ring:
            slot = self.slots.newest % self.sliding_window
            self.keys.index_copy_(2, slot, key_states)
            self.values.index_copy_(2, slot, value_states)
            self.cumulative_length += 1
            return self.keys, self.values
        with self._dynamic():
            keys, values = super().update(key_states, value_states, *args, **kwargs)
        # With past recording, transformers 5.17 returns keys that its masks leave out; 5.24 does not.
        reach = self.sliding_window - 1 + key_states.shape[2]
        return keys[:, :, -reach:], values[:, :, -reach:]

    def activate_past_recording(self) -> None:
        """Keeps tokens beyond the window until `crop`; slots are no longer fixed."""
        self._make_dynamic()
        self.slots.release()
        super().activate_past_recording()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Removes tokens as transformers does, which refuses it once the window is full."""
        with self._dynamic():
            super().crop(*args, **kwargs)

    def reset(self) -> None:
        """Removes all tokens and frees their memory."""
        # transformers up to 5.19 would keep tensors of the former batch.
        self.ring = self.keys = self.values = None
        self.is_initialized = False
        self.cumulative_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the sequences, for beam search; a ring keeps its address."""
        if not self._is_ring:
            super().reorder_cache(beam_idx)
            return
        for part in (self.keys, self.values):
            part.copy_(part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence `repeats` times."""
        with self._dynamic():
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences."""
        with self._dynamic():
            super().batch_select_indices(indices)

    def set_length(self, seen: int) -> None:
        """Sets the number of tokens, after steps that ran on the device alone."""
        self.cumulative_length = seen

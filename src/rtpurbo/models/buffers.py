"""The tensors a layer's cache is made of: one that grows, and a ring that does not."""

from __future__ import annotations

import torch
from torch import Tensor

from rtpurbo.errors import RTPurboError
from rtpurbo.ops import KeyValueStates


class GrowingBuffer:
    """A tensor [batch, heads, capacity, dim] that grows by an eighth when it is full."""

    def __init__(self, reserve: int = 0) -> None:
        self.reserve = reserve
        self.length = 0
        self.storage: Tensor | None = None

    def append(self, states: Tensor) -> Tensor:
        """Adds states [batch, heads, new, dim] and returns everything held so far, as a view."""
        needed = self.length + states.shape[2]
        capacity = 0 if self.storage is None else self.storage.shape[2]
        if needed > capacity:
            grown = max(needed, self.reserve, capacity + capacity // 8)
            storage = states.new_zeros(states.shape[0], states.shape[1], grown, states.shape[3])
            if self.storage is not None:
                storage[:, :, : self.length] = self.storage[:, :, : self.length]
            self.storage = storage
        assert self.storage is not None
        self.storage[:, :, self.length : needed] = states
        self.length = needed
        return self.storage[:, :, :needed]


class RingBuffer:
    """Bounded KV heads: S slots for sinks, R for the latest tokens, and one that is never read.

    A token at position p lives in slot p if it is a sink, else in slot S + (p - S) % R; padding and
    tokens that a longer chunk has already outlived go to the last slot, so that writing needs no
    look at the data.

    Args:
        num_sink_tokens: S.
        sliding_window: W, what a query must still find.
        crop_slack: R - W, tokens that can be taken back once the ring has wrapped.
    """

    def __init__(self, num_sink_tokens: int, sliding_window: int, crop_slack: int) -> None:
        self.num_sink_tokens = num_sink_tokens
        self.sliding_window = sliding_window
        self.size = sliding_window + crop_slack
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.positions: Tensor | None = None

    def append(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        first_slots: Tensor | None = None,
        seen: int = 0,
    ) -> KeyValueStates:
        """Adds tokens and returns what their queries may see: the old ring and the new tokens.

        Args:
            keys: [batch, heads, new, head_dim].
            values: likewise.
            positions: int64 [batch, new], -1 for padding.
            first_slots: int32 [batch], the slot of position 0 among all tokens of a sequence; None
                if slots do not run on with positions.
            seen: slots of all tokens before these.
        """
        new = keys.shape[2]
        if self.keys is None:
            self._allocate(keys, values, positions)
            self._write(keys, values, positions)
            if new > 1:
                return KeyValueStates(keys, values, positions, first_slots=first_slots)
            return self._held()
        if new == 1:
            self._write(keys, values, positions)
            return self._held()
        if first_slots is not None:
            return self._append_in_order(keys, values, positions, first_slots, seen)
        held = self._held()
        states = KeyValueStates(
            torch.cat([held.keys, keys], 2),
            torch.cat([held.values, values], 2),
            torch.cat([held.positions, positions], 1),
        )
        self._write(keys, values, positions)
        return states

    def _append_in_order(
        self, keys: Tensor, values: Tensor, positions: Tensor, first_slots: Tensor, seen: int
    ) -> KeyValueStates:
        """Sinks in S slots of their own, then the window before the new tokens, then these.

        Every sink lies among the sinks and nowhere else, so that it is found at one place, and read
        once.
        """
        assert self.keys is not None
        assert self.values is not None
        assert self.positions is not None
        sinks, kept = self.num_sink_tokens, min(self.sliding_window - 1, seen)
        window = torch.arange(seen - kept, seen, device=keys.device) - first_slots[:, None]
        slots = torch.where(window < sinks, sinks, sinks + (window - sinks) % self.size)
        is_held = (window >= sinks) & (self.positions.gather(1, slots) == window)
        along = slots[:, None, :, None]
        window_keys = self.keys.gather(2, along.expand(*keys.shape[:2], -1, keys.shape[3]))
        window_values = self.values.gather(2, along.expand(*values.shape[:2], -1, values.shape[3]))
        # Only now, as it may overwrite what was just gathered; sinks may be among the new tokens.
        self._write(keys, values, positions)
        return KeyValueStates(
            torch.cat([self.keys[:, :, :sinks], window_keys, keys], 2),
            torch.cat([self.values[:, :, :sinks], window_values, values], 2),
            torch.cat(
                [
                    self.positions[:, :sinks],
                    window.masked_fill(~is_held, -1),
                    positions.masked_fill(positions < sinks, -1),
                ],
                1,
            ),
            first_slots=first_slots + (sinks + kept - seen),
            sink_slots=torch.zeros_like(first_slots),
        )

    def _allocate(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        batch, heads, _, _ = keys.shape
        slots = self.num_sink_tokens + self.size + 1
        self.keys = keys.new_zeros(batch, heads, slots, keys.shape[-1])
        self.values = values.new_zeros(batch, heads, slots, values.shape[-1])
        self.positions = positions.new_full((batch, slots), -1)

    def _held(self) -> KeyValueStates:
        assert self.keys is not None
        assert self.values is not None
        assert self.positions is not None
        return KeyValueStates(self.keys[:, :, :-1], self.values[:, :, :-1], self.positions[:, :-1])

    def _write(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        assert self.keys is not None
        assert self.values is not None
        assert self.positions is not None
        sinks, unread = self.num_sink_tokens, self.num_sink_tokens + self.size
        latest = positions.amax(1, keepdim=True)
        kept = (positions >= 0) & ((positions < sinks) | (positions > latest - self.size))
        slots = torch.where(positions < sinks, positions, sinks + (positions - sinks) % self.size)
        slots = slots.masked_fill(~kept, unread)
        along = slots[:, None, :, None]
        self.keys.scatter_(2, along.expand(keys.shape), keys)
        self.values.scatter_(2, along.expand(values.shape), values)
        self.positions.scatter_(1, slots, positions)

    def forget_from(self, next_positions: Tensor) -> None:
        """Drops tokens at or after `next_positions` [batch].

        Raises:
            RTPurboError: the window before them is no longer whole.
        """
        if self.positions is None:
            return
        positions = self._held().positions
        limit = next_positions[:, None]
        # One token more than a query needs, so that the slack is what it says.
        first = (limit - self.sliding_window).clamp(min=0)
        present = ((positions >= first) & (positions < limit)).sum(1)
        if bool((present < (limit - first)[:, 0]).any()):
            raise RTPurboError(
                f"the cache can take back at most {self.size - self.sliding_window} tokens once "
                "its window is full; create it with a larger crop_slack."
            )
        self.positions.masked_fill_(self.positions >= limit, -1)

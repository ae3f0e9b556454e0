"""Slots of windowed KV heads: a ring buffer of sinks and of the latest tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rtpurbo.errors import RTPurboError


class RingSlots:
    """Slots of a ring buffer: S for sinks, R for the latest tokens, one that is never read.

    A token at position p has slot p if it is a sink, else slot S + (p - S) % R. Padding, and tokens
    that later ones of the same chunk overwrite, have the last slot, so that a write does not depend on
    the data.

    Args:
        num_sink_tokens: S.
        sliding_window: W, keys that a query reads.
        crop_slack: R - W, tokens that can be removed once the ring has wrapped.

    Attributes:
        positions: int64 [batch, S + R + 1], of the tokens in the ring; -1 where there is none.
        new_slots: int64 [batch, new], the slots of the new tokens.
        window: int64 [batch, keys], the slots whose keys the queries of several new tokens read
            before they are overwritten; None if they read the ring after the write, or none of it.
        key_positions: int64 [batch, keys], the positions of the keys that the new queries read.
        in_order: see `KeyValueStates`, also for the next two.
        first_slots: of the keys that these queries read.
        sink_slots: of the sinks among them.
    """

    def __init__(self, num_sink_tokens: int, sliding_window: int, crop_slack: int) -> None:
        self.num_sink_tokens = num_sink_tokens
        self.sliding_window = sliding_window
        self.size = sliding_window + crop_slack
        self.clear()

    def clear(self) -> None:
        """Removes all tokens."""
        self.positions: Tensor | None = None
        self.end_forward()

    def end_forward(self) -> None:
        """Drops the tensors of one forward."""
        self.new_slots: Tensor | None = None
        self.window: Tensor | None = None
        self.key_positions: Tensor | None = None
        self.in_order = False
        self.first_slots: Tensor | None = None
        self.sink_slots: Tensor | None = None

    def begin_forward(
        self,
        positions: Tensor,
        first_slots: Tensor | None = None,
        seen: int = 0,
        in_order: bool = False,
    ) -> None:
        """Assigns slots to new tokens, whose queries read the ring and the new tokens.

        Args:
            positions: int64 [batch, new], -1 for padding.
            first_slots: int32 [batch], the slot of position 0 among all tokens of a sequence; None
                if slots are not positions plus an offset.
            seen: number of earlier tokens.
            in_order: no sequence is padded.
        """
        self.end_forward()
        batch, new = positions.shape
        is_first = self.positions is None
        if self.positions is None:
            slots = self.num_sink_tokens + self.size + 1
            self.positions = positions.new_full((batch, slots), -1)
        self.new_slots = self._slots_of(positions)
        if new == 1:
            self.positions.scatter_(1, self.new_slots, positions)
            self.key_positions = self.positions[:, :-1]
        elif is_first:
            self.positions.scatter_(1, self.new_slots, positions)
            self.key_positions, self.in_order = positions, in_order
            self.first_slots = None if in_order else first_slots
        else:
            self._begin_chunk(positions, first_slots, seen)

    def _slots_of(self, positions: Tensor) -> Tensor:
        sinks, unread = self.num_sink_tokens, self.num_sink_tokens + self.size
        slots = torch.where(positions < sinks, positions, sinks + (positions - sinks) % self.size)
        kept = positions >= 0
        if positions.shape[1] > 1:
            latest = positions.amax(1, keepdim=True)
            kept &= (positions < sinks) | (positions > latest - self.size)
        return slots.masked_fill(~kept, unread)

    def _begin_chunk(self, positions: Tensor, first_slots: Tensor | None, seen: int) -> None:
        """Assigns the keys of several tokens after earlier ones: sinks, then the window, then new tokens.

        A sink is among the sinks only, so that it is read once.
        """
        assert self.positions is not None
        assert self.new_slots is not None
        sinks = self.num_sink_tokens
        if first_slots is None:
            self.window = torch.arange(sinks, sinks + self.size, device=positions.device)
            self.window = self.window.expand(positions.shape[0], self.size)
            before = self.positions[:, sinks:-1].clone()
        else:
            kept = min(self.sliding_window - 1, seen)
            places = torch.arange(seen - kept, seen, device=positions.device)
            wanted = places - first_slots[:, None]
            self.window = self._slots_of(wanted.masked_fill(wanted < sinks, -1))
            is_held = (wanted >= sinks) & (self.positions.gather(1, self.window) == wanted)
            before = wanted.masked_fill(~is_held, -1)
            self.first_slots = first_slots + (sinks + kept - seen)
            self.sink_slots = torch.zeros_like(first_slots)
        self.positions.scatter_(1, self.new_slots, positions)
        others = positions.masked_fill(positions < sinks, -1)
        self.key_positions = torch.cat([self.positions[:, :sinks], before, others], 1)

    def check_whole_before(self, next_positions: Tensor) -> None:
        """Refuses to remove tokens at or after `next_positions` [batch] if the window before them is gone.

        Raises:
            RTPurboError: keys of that window have been overwritten.
        """
        assert self.positions is not None
        positions, limit = self.positions[:, :-1], next_positions[:, None]
        # One token more than a query reads, so that exactly `crop_slack` tokens can be removed.
        first = (limit - self.sliding_window).clamp(min=0)
        present = ((positions >= first) & (positions < limit)).sum(1)
        if bool((present < (limit - first)[:, 0]).any()):
            raise RTPurboError(
                f"the cache can take back at most {self.size - self.sliding_window} tokens once "
                "its window is full; create it with a larger crop_slack."
            )

    def forget_from(self, next_positions: Tensor) -> None:
        """Removes the tokens at or after `next_positions` [batch]."""
        assert self.positions is not None
        self.positions.masked_fill_(self.positions >= next_positions[:, None], -1)

"""Bounded KV heads: a ring of sinks and of the latest tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from rtpurbo.errors import RTPurboError
from rtpurbo.ops import KeyValueStates


class RingSlots:
    """Slots of a ring: S for sinks, R for the latest tokens, one that is never read.

    A token at position p takes slot p if it is a sink, else slot S + (p - S) % R; padding and tokens
    that a longer chunk has already outlived go to the last slot, so that writing needs no look at
    the data.

    Args:
        num_sink_tokens: S.
        sliding_window: W, what a query must still find.
        crop_slack: R - W, tokens that can be taken back once the ring has wrapped.

    Attributes:
        positions: int64 [batch, S + R + 1], of the tokens in the ring; -1 where there is none.
        entering: int64 [batch, new], the slots of the tokens that entered last.
        window: int64 [batch, keys], the slots whose keys the queries of several new tokens read
            before they are overwritten; None if they read the ring as it then is, or none of it.
        labels: int64 [batch, keys], the positions of the keys that these queries read.
        in_order: see `KeyValueStates`, as are the next two.
        first_slots: of the keys that these queries read.
        sink_slots: of the sinks among them.
    """

    def __init__(self, num_sink_tokens: int, sliding_window: int, crop_slack: int) -> None:
        self.num_sink_tokens = num_sink_tokens
        self.sliding_window = sliding_window
        self.size = sliding_window + crop_slack
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.positions: Tensor | None = None
        self.leave()

    def leave(self) -> None:
        """Lets go of what served one forward."""
        self.entering: Tensor | None = None
        self.window: Tensor | None = None
        self.labels: Tensor | None = None
        self.in_order = False
        self.first_slots: Tensor | None = None
        self.sink_slots: Tensor | None = None

    def enter(
        self,
        positions: Tensor,
        first_slots: Tensor | None = None,
        seen: int = 0,
        in_order: bool = False,
    ) -> None:
        """Tokens enter; their queries read the old ring and the new tokens.

        Args:
            positions: int64 [batch, new], -1 for padding.
            first_slots: int32 [batch], the slot of position 0 among all tokens of a sequence; None
                if slots do not run on with positions.
            seen: slots of all tokens before these.
            in_order: no sequence is padded.
        """
        self.leave()
        batch, new = positions.shape
        is_first = self.positions is None
        if self.positions is None:
            slots = self.num_sink_tokens + self.size + 1
            self.positions = positions.new_full((batch, slots), -1)
        self.entering = self._slots_of(positions)
        if new == 1:
            self.positions.scatter_(1, self.entering, positions)
            self.labels = self.positions[:, :-1]
        elif is_first:
            self.positions.scatter_(1, self.entering, positions)
            self.labels, self.in_order = positions, in_order
            self.first_slots = None if in_order else first_slots
        else:
            self._enter_behind(positions, first_slots, seen)

    def _slots_of(self, positions: Tensor) -> Tensor:
        sinks, unread = self.num_sink_tokens, self.num_sink_tokens + self.size
        slots = torch.where(positions < sinks, positions, sinks + (positions - sinks) % self.size)
        kept = positions >= 0
        if positions.shape[1] > 1:
            latest = positions.amax(1, keepdim=True)
            kept &= (positions < sinks) | (positions > latest - self.size)
        return slots.masked_fill(~kept, unread)

    def _enter_behind(self, positions: Tensor, first_slots: Tensor | None, seen: int) -> None:
        """Several tokens behind a ring: sinks in S slots of their own, then window, then new ones.

        Every sink lies among the sinks and nowhere else, so that it is found at one place, and read
        once.
        """
        assert self.positions is not None
        assert self.entering is not None
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
        self.positions.scatter_(1, self.entering, positions)
        others = positions.masked_fill(positions < sinks, -1)
        self.labels = torch.cat([self.positions[:, :sinks], before, others], 1)

    def check_whole_before(self, next_positions: Tensor) -> None:
        """Refuses to take back tokens from `next_positions` [batch] on, if they left too little.

        Raises:
            RTPurboError: the window before them is no longer whole.
        """
        assert self.positions is not None
        positions, limit = self.positions[:, :-1], next_positions[:, None]
        # One token more than a query needs, so that the slack is what it says.
        first = (limit - self.sliding_window).clamp(min=0)
        present = ((positions >= first) & (positions < limit)).sum(1)
        if bool((present < (limit - first)[:, 0]).any()):
            raise RTPurboError(
                f"the cache can take back at most {self.size - self.sliding_window} tokens once "
                "its window is full; create it with a larger crop_slack."
            )

    def forget_from(self, next_positions: Tensor) -> None:
        """Drops tokens at or after `next_positions` [batch]."""
        assert self.positions is not None
        self.positions.masked_fill_(self.positions >= next_positions[:, None], -1)


class RingBuffer:
    """Keys and values of windowed KV heads, [batch, heads, S + R + 1, dim], in the slots of a ring.

    Args:
        slots: which token lies where; its `enter` comes before every `append`.
    """

    def __init__(self, slots: RingSlots) -> None:
        self.slots = slots
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> KeyValueStates:
        """Adds the tokens that entered last, and returns what their queries may see.

        Args:
            keys: [batch, heads, new, head_dim].
            values: shaped as `keys`.
        """
        slots, device = self.slots, keys.device
        assert slots.entering is not None
        if self.keys is None or self.values is None:
            num_slots = slots.num_sink_tokens + slots.size + 1
            self.keys, self.values = (
                part.new_zeros(*part.shape[:2], num_slots, part.shape[3]) for part in (keys, values)
            )
        # Under autocast, and without it, states come in different types.
        keys, values = keys.to(self.keys.dtype), values.to(self.values.dtype)
        before = None
        if slots.window is not None:
            # Before it is overwritten.
            window = slots.window.to(device)
            before = [_gather(part, window) for part in (self.keys, self.values)]
        entering = slots.entering.to(device)[:, None, :, None]
        self.keys.scatter_(2, entering.expand(keys.shape), keys)
        self.values.scatter_(2, entering.expand(values.shape), values)
        if before is not None:
            sinks = slots.num_sink_tokens
            keys = torch.cat([self.keys[:, :, :sinks], before[0], keys], 2)
            values = torch.cat([self.values[:, :, :sinks], before[1], values], 2)
        elif keys.shape[2] == 1:
            return self.states()
        return self._labelled(keys, values)

    def states(self) -> KeyValueStates:
        """Keys and values held, as the query of the latest token sees them."""
        assert self.keys is not None
        assert self.values is not None
        return self._labelled(self.keys[:, :, :-1], self.values[:, :, :-1])

    def _labelled(self, keys: Tensor, values: Tensor) -> KeyValueStates:
        slots, device = self.slots, keys.device
        assert slots.labels is not None
        first_slots, sink_slots = (
            None if tensor is None else tensor.to(device)
            for tensor in (slots.first_slots, slots.sink_slots)
        )
        return KeyValueStates(
            keys,
            values,
            slots.labels.to(device),
            in_order=slots.in_order,
            first_slots=first_slots,
            sink_slots=sink_slots,
        )


def _gather(states: Tensor, slots: Tensor) -> Tensor:
    """The states [batch, heads, keys, dim] in these slots [batch, keys]."""
    batch, heads, _, dim = states.shape
    return states.gather(2, slots[:, None, :, None].expand(batch, heads, -1, dim))

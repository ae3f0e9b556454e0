"""Where the tokens of a cache lie: how its sequences are padded, and the position of each token.

It is the same in every layer, so a forward works it out once, before the layers run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from rtpurbo.errors import RTPurboError

# No padding at all; padding before the first real token only; padding anywhere.
Padding = Literal["none", "left", "any"]


def padding_form(mask: Tensor) -> Padding:
    """How the sequences of a mask [batch, tokens] are padded: one look at the data."""
    mask = mask.to(torch.bool)
    looks = torch.stack([mask.all(), (mask[:, 1:] >= mask[:, :-1]).all()])
    is_whole, is_ascending = looks.tolist()
    if is_whole:
        return "none"
    return "left" if is_ascending else "any"


def positions_of(mask: Tensor) -> Tensor:
    """Positions int64 [batch, tokens] of a mask's tokens, -1 for padding."""
    real = mask.to(torch.bool)
    return (real.cumsum(1) - 1).masked_fill(~real, -1)


def leading_padding(mask: Tensor) -> Tensor:
    """Padding before the first real token of each sequence: int32 [batch]."""
    return (mask.cumsum(1) == 0).sum(1, dtype=torch.int32)


class RingSlots:
    """Which slot of a ring a token takes: S for sinks, R for the latest tokens, one never read.

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
        sink_slots: likewise.
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


class TokenSlots:
    """What all layers of a cache have in common: the slots of its tokens.

    Slots count the tokens that entered, padding included; positions count the real ones of a
    sequence. `enter` is told of every forward before the layers run, and looks at the data only
    where a prompt or several tokens enter: a token that enters alone later on is real.

    Fixed slots (`fix`) serve steps of one token whose operations are the same at any length: what
    changes from step to step lives on the device alone, at the same addresses.

    Args:
        ring: the slots of bounded KV heads.

    Attributes:
        padding: the form of the padding so far; `any` stays.
        first_slots: int32 [batch], the slot of position 0 in each sequence; None if padding is `any`.
        fixed_positions: int64 [batch, capacity], of all tokens while slots are fixed; -1 for padding
            and beyond the length.
        length: int32 [1], slots in use while slots are fixed.
        positions: int64 [batch, slots], of every token of the last forward and before it; -1 for
            padding.
        query_positions: int64 [batch, new], of the tokens that entered last.
        newest: int64 [1], the slot of the one token that entered last while slots are fixed; None
            after any other forward.
    """

    fixed_positions: Tensor | None
    length: Tensor | None

    def __init__(self, ring: RingSlots) -> None:
        self.ring = ring
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.padding: Padding = "none"
        self.first_slots: Tensor | None = None
        self.release()
        self.leave()
        self.ring.clear()

    def leave(self) -> None:
        """Lets go of what served one forward."""
        self.positions: Tensor | None = None
        self.query_positions: Tensor | None = None
        self.newest: Tensor | None = None
        self.ring.leave()

    def enter(
        self, mask: Tensor | None, batch: int, seen: int, new: int, device: torch.device
    ) -> None:
        """Tokens enter behind those already seen.

        Args:
            mask: [batch, seen + new], 1 for real tokens; None if what enters is real.
            batch: sequences.
            seen: slots in use before.
            new: slots that are added.
            device: of the labels.
        """
        if seen == 0:
            self.clear()
        if mask is not None:
            mask = self._fitting(mask, batch, seen + new).to(device, torch.bool)
            if self.padding != "any" and (seen == 0 or new > 1):
                self.padding = padding_form(mask)
        if self.padding == "any":
            self.release()
        self.newest = None
        self._set_first_slots(mask, batch, device)
        if self.is_fixed and new == 1:
            self._enter_fixed(seen)
        else:
            self._enter_growing(mask, batch, seen, new, device)
        assert self.query_positions is not None
        self.ring.enter(self.query_positions, self.first_slots, seen, self.padding == "none")

    @staticmethod
    def _fitting(mask: Tensor, batch: int, total: int) -> Tensor:
        if mask.shape[0] != batch or mask.shape[1] < total:
            raise RTPurboError(
                f"the attention mask is {tuple(mask.shape)}, but must be {(batch, total)}: "
                "it covers the tokens in the cache and the new ones."
            )
        return mask[:, :total]

    def _set_first_slots(self, mask: Tensor | None, batch: int, device: torch.device) -> None:
        if self.padding == "any":
            self.first_slots = None
        elif self.first_slots is None:
            self.first_slots = torch.zeros(batch, dtype=torch.int32, device=device)
        if self.padding == "left" and mask is not None:
            assert self.first_slots is not None
            self.first_slots.copy_(leading_padding(mask))

    def _enter_growing(
        self, mask: Tensor | None, batch: int, seen: int, new: int, device: torch.device
    ) -> None:
        places = torch.arange(seen + new, device=device)
        if self.padding == "left":
            assert self.first_slots is not None
            labels = (places - self.first_slots[:, None]).clamp(min=-1)
        elif self.padding == "any" and mask is not None:
            labels = positions_of(mask)
        else:
            labels = places.expand(batch, seen + new)
        self.positions, self.query_positions = labels, labels[:, seen:]
        if self.is_fixed:
            self._count(seen + new)

    def _enter_fixed(self, seen: int) -> None:
        assert self.first_slots is not None
        assert self.fixed_positions is not None
        assert self.length is not None
        if self._counted != seen:  # tokens were taken back
            self._count(seen)
        self.newest = self.length.long()
        self.length += 1
        self.query_positions = (self.newest - self.first_slots)[:, None].clamp(min=-1)
        self.fixed_positions.index_copy_(1, self.newest, self.query_positions)
        self.positions = self.fixed_positions
        self._counted += 1

    @property
    def is_fixed(self) -> bool:
        """Whether steps of one token run in fixed slots."""
        return self.length is not None

    @property
    def capacity(self) -> int:
        """Slots that are fixed, in use or not."""
        return 0 if self.fixed_positions is None else self.fixed_positions.shape[1]

    def fix(self, capacity: int, seen: int) -> None:
        """Fixes this many slots, of which `seen` are in use."""
        assert self.first_slots is not None
        batch, device = self.first_slots.shape[0], self.first_slots.device
        self.fixed_positions = torch.empty(batch, capacity, dtype=torch.int64, device=device)
        self.length = torch.empty(1, dtype=torch.int32, device=device)
        self._count(seen)

    def release(self) -> None:
        """Steps of one token run in slots that grow again."""
        self.fixed_positions = None
        self.length = None
        self._counted = 0

    def count_step(self, steps: int) -> None:
        """Follows steps that the device has taken on its own, or takes back as many (negative)."""
        self._counted += steps

    def _count(self, seen: int) -> None:
        """Brings what lives on the device to this many slots in use."""
        assert self.first_slots is not None
        assert self.fixed_positions is not None
        assert self.length is not None
        places = torch.arange(self.capacity, device=self.length.device)
        labels = (places - self.first_slots[:, None]).clamp(min=-1)
        self.fixed_positions.copy_(labels.masked_fill(places >= seen, -1))
        self.length.fill_(seen)
        self._counted = seen

    def window_mask(self, window: int) -> Tensor:
        """What a step in fixed slots sees of a ring of `window` slots: bool [batch, 1, 1, window].

        The token of slot s lies in slot s % window of such a ring.
        """
        assert self.first_slots is not None
        assert self.newest is not None
        held = (
            self.newest - (self.newest - torch.arange(window, device=self.newest.device)) % window
        )
        return (held >= self.first_slots[:, None])[:, None, None]

    def next_positions(self, seen: int) -> Tensor:
        """The position int64 [batch] of the token that would follow the first `seen` slots."""
        if self.first_slots is not None:
            return (seen - self.first_slots.long()).clamp(min=0)
        assert self.positions is not None
        return self.positions[:, :seen].amax(1) + 1

    def map_rows(self, change: Callable[[Tensor], Tensor], in_place: bool = False) -> None:
        """Rearranges the sequences.

        Args:
            change: what happens to a tensor whose first dimension are the sequences.
            in_place: there are as many as before, and fixed slots keep their addresses.
        """
        labels = self.positions
        self.leave()
        if self.padding == "any":
            self.positions = labels  # `next_positions` cannot do without
        for owner, name in self._tensors():
            tensor = getattr(owner, name)
            if tensor is None:
                continue
            if in_place and self.is_fixed:
                tensor.copy_(change(tensor))
            else:
                setattr(owner, name, change(tensor))

    def _tensors(self) -> Iterator[tuple[Any, str]]:
        for name in ("first_slots", "fixed_positions", "positions"):
            yield self, name
        yield self.ring, "positions"

    def tensors(self) -> list[Tensor]:
        """What is kept between forwards, but for the labels of the last one while slots grow."""
        tensors = (self.first_slots, self.fixed_positions, self.length, self.ring.positions)
        return [tensor for tensor in tensors if tensor is not None]

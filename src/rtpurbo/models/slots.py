"""Slots of the tokens of a cache: padding of its sequences, and the position of each token.

They are the same in every layer, so a forward computes them once, before the layers run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rtpurbo.errors import RTPurboError
from rtpurbo.models.ring import RingSlots

# No padding; padding before the first token of a sequence only; padding anywhere.
Padding = Literal["none", "left", "any"]


class WindowedPositions(NamedTuple):
    """Keys of a layer with a sliding window of its own, which it receives in place of an attention mask.

    Attributes:
        positions: int64 [batch, k_len], -1 for padding and for empty slots. They count slots, as the masks of
            transformers do: padding between tokens takes a position too.
        query_positions: int64 [batch, q_len], of the last tokens.
        window: keys that a query reads, including its own.
        in_order: as `KeyValueStates.in_order`.
        first_slots: as `KeyValueStates.first_slots`.
    """

    positions: Tensor
    query_positions: Tensor
    window: int
    in_order: bool = False
    first_slots: Tensor | None = None

    @classmethod
    def build(
        cls, mask: Tensor | None, batch: int, q_len: int, k_len: int, window: int, device: Any
    ) -> WindowedPositions:
        """Returns the positions of `k_len` keys, the last of which are those of the queries.

        The mask is bool [batch, k_len], False for padding; None without padding.
        """
        places = torch.arange(k_len, device=device)
        if mask is None:
            positions = places.expand(batch, k_len)
            return cls(positions, positions[:, k_len - q_len :], window, in_order=True)
        first = leading_padding(mask)
        positions = (places - first[:, None]).masked_fill(~mask, -1)
        # The order only matters for several queries, and to find it synchronises with the device.
        is_ordered = q_len > 1 and padding_form(mask)[0] != "any"
        return cls(
            positions,
            positions[:, k_len - q_len :],
            window,
            first_slots=first if is_ordered else None,
        )

    def to(self, device: torch.device) -> WindowedPositions:
        """Returns the same on a device."""
        parts: list[Any] = [part.to(device) if isinstance(part, Tensor) else part for part in self]
        return WindowedPositions(*parts)


def padding_form(mask: Tensor) -> tuple[Padding, bool]:
    """Classifies a mask [batch, tokens], with one synchronisation of the device.

    Returns:
        The padding of its sequences, and whether each has a real token, after which left padding ends.
    """
    mask = mask.to(torch.bool)
    tests = [mask.all(), (mask[:, 1:] >= mask[:, :-1]).all(), mask.any(1).all()]
    is_whole, is_ascending, have_begun = torch.stack(tests).tolist()
    if is_whole:
        return "none", True
    return "left" if is_ascending else "any", have_begun


def fitting_mask(mask: Tensor, batch: int, total: int) -> Tensor:
    """Returns a mask cut to [batch, total].

    Raises:
        RTPurboError: it is shorter, or of another number of sequences.
    """
    if mask.shape[0] != batch or mask.shape[1] < total:
        raise RTPurboError(
            f"the attention mask is {tuple(mask.shape)}, but must be {(batch, total)}: it covers the "
            "tokens in the cache, if there is one, and the new ones."
        )
    return mask[:, :total]


def positions_of(mask: Tensor) -> Tensor:
    """Returns the positions int64 [batch, tokens] of a mask's tokens, -1 for padding."""
    real = mask.to(torch.bool)
    return (real.cumsum(1) - 1).masked_fill(~real, -1)


def leading_padding(mask: Tensor) -> Tensor:
    """Returns the padding before the first real token of each sequence: int32 [batch]."""
    return (mask.cumsum(1) == 0).sum(1, dtype=torch.int32)


class TokenSlots:
    """Slots of tokens, which all layers of a cache share.

    Slots count the tokens of the cache, padding included; positions count the real ones of a
    sequence. `begin_forward` runs before the layers of every forward, and reads the mask on the host
    only for a prompt or several tokens: a single token is real once every sequence has a real token.

    Fixed slots (`fix`) belong to a static cache, whose decode steps have the same operations at any
    length: what changes between steps is stored on the device, at the same addresses.

    Attributes:
        ring: the slots of windowed KV heads.
        padding: padding of all tokens so far; `any` is final.
        have_begun: every sequence has a real token.
        first_slots: int32 [batch], the slot of position 0 in each sequence; None if padding is `any`.
        fixed_positions: int64 [batch, capacity], of all tokens while slots are fixed; -1 for padding
            and beyond the length.
        length: int32 [1], slots in use while slots are fixed.
        positions: int64 [batch, slots], of every token of the last forward and before it; -1 for
            padding.
        query_positions: int64 [batch, new], of the new tokens.
        newest: int64 [1], the slot of the new token of a decode step in fixed slots; None in any
            other forward.
    """

    fixed_positions: Tensor | None
    length: Tensor | None

    def __init__(self, ring: RingSlots) -> None:
        self.ring = ring
        self.clear()

    def clear(self) -> None:
        """Removes all tokens."""
        self.padding: Padding = "none"
        self.have_begun = True
        self.first_slots: Tensor | None = None
        self.release()
        self.end_forward()
        self.ring.clear()

    def end_forward(self) -> None:
        """Drops the tensors of one forward."""
        self.positions: Tensor | None = None
        self.query_positions: Tensor | None = None
        self.newest: Tensor | None = None
        self.ring.end_forward()

    def begin_forward(
        self, mask: Tensor | None, batch: int, seen: int, new: int, device: torch.device
    ) -> None:
        """Assigns slots to the `new` tokens of a forward, after `seen` slots in use.

        The mask is [batch, seen + new], 1 for real tokens; None if the new tokens are real.
        """
        if seen == 0:
            self.clear()
        if mask is not None:
            mask = fitting_mask(mask, batch, seen + new).to(device, torch.bool)
            if self.padding != "any" and (seen == 0 or new > 1 or not self.have_begun):
                self.padding, self.have_begun = padding_form(mask)
                self._set_first_slots(mask)
        elif self.first_slots is None and self.padding == "none":
            self.first_slots = torch.zeros(batch, dtype=torch.int32, device=device)
        self.newest = None
        if self.is_fixed and new == 1:
            self._begin_fixed(seen)
        else:
            self._begin_growing(mask, batch, seen, new, device)
        assert self.query_positions is not None
        self.ring.begin_forward(
            self.query_positions, self.first_slots, seen, self.padding == "none"
        )

    def _set_first_slots(self, mask: Tensor) -> None:
        if self.padding == "any":
            self.first_slots = None
            self.release()
            return
        # Fixed slots keep their address.
        if self.first_slots is None:
            self.first_slots = torch.empty(mask.shape[0], dtype=torch.int32, device=mask.device)
        self.first_slots.copy_(leading_padding(mask))

    def _begin_growing(
        self, mask: Tensor | None, batch: int, seen: int, new: int, device: torch.device
    ) -> None:
        places = torch.arange(seen + new, device=device)
        if self.padding == "left":
            assert self.first_slots is not None
            positions = (places - self.first_slots[:, None]).clamp(min=-1)
        elif self.padding == "any" and mask is not None:
            positions = positions_of(mask)
        else:
            positions = places.expand(batch, seen + new)
        self.positions, self.query_positions = positions, positions[:, seen:]
        if self.is_fixed:
            self.rewind(seen + new)

    def _begin_fixed(self, seen: int) -> None:
        assert self.first_slots is not None
        assert self.fixed_positions is not None
        assert self.length is not None
        if self._counted != seen:  # tokens were removed
            self.rewind(seen)
        self.newest = self.length.long()
        self.length += 1
        self.query_positions = (self.newest - self.first_slots)[:, None].clamp(min=-1)
        self.fixed_positions.index_copy_(1, self.newest, self.query_positions)
        self.positions = self.fixed_positions
        self._counted += 1

    @property
    def is_fixed(self) -> bool:
        """True if steps of one token run in fixed slots."""
        return self.length is not None

    @property
    def capacity(self) -> int:
        """Number of fixed slots, in use or not."""
        return 0 if self.fixed_positions is None else self.fixed_positions.shape[1]

    def fix(self, capacity: int, seen: int) -> None:
        """Fixes this many slots, of which `seen` are in use."""
        assert self.first_slots is not None
        batch, device = self.first_slots.shape[0], self.first_slots.device
        self.fixed_positions = torch.empty(batch, capacity, dtype=torch.int64, device=device)
        self.length = torch.empty(1, dtype=torch.int32, device=device)
        self.rewind(seen)

    def release(self) -> None:
        """Undoes `fix`: decode steps append slots again."""
        self.fixed_positions = None
        self.length = None
        self._counted = 0

    def set_length(self, seen: int) -> None:
        """Sets the number of slots in use, after steps that ran on the device alone."""
        self._counted = seen

    def rewind(self, seen: int) -> None:
        """Sets the counters on the device to this many slots in use."""
        assert self.first_slots is not None
        assert self.fixed_positions is not None
        assert self.length is not None
        places = torch.arange(self.capacity, device=self.length.device)
        positions = (places - self.first_slots[:, None]).clamp(min=-1)
        self.fixed_positions.copy_(positions.masked_fill(places >= seen, -1))
        self.length.fill_(seen)
        self._counted = seen

    def window_positions(self, window: int) -> WindowedPositions:
        """Positions in a step in fixed slots over a ring of `window` slots.

        The token of slot s is in slot s % window of such a ring.
        """
        assert self.first_slots is not None
        assert self.newest is not None
        assert self.query_positions is not None
        held = (
            self.newest - (self.newest - torch.arange(window, device=self.newest.device)) % window
        )
        positions = (held - self.first_slots[:, None]).clamp(min=-1)
        return WindowedPositions(positions, self.query_positions, window)

    def take_back(self, next_positions: Tensor) -> None:
        """Removes the tokens at or after these positions [batch]; see `check_whole_before`."""
        self.ring.forget_from(next_positions)
        if self.padding == "left":
            self.have_begun = bool((next_positions > 0).all())

    def next_positions(self, seen: int) -> Tensor:
        """Returns the position int64 [batch] of the token after the first `seen` slots."""
        if self.first_slots is not None:
            return (seen - self.first_slots.long()).clamp(min=0)
        assert self.positions is not None
        return self.positions[:, :seen].amax(1) + 1

    def map_rows(self, change: Callable[[Tensor], Tensor], in_place: bool = False) -> None:
        """Rearranges the sequences by a function of a tensor whose first dimension they are.

        With `in_place`, their number stays, and fixed slots keep their addresses.
        """
        positions = self.positions
        self.end_forward()
        if self.padding == "any":
            self.positions = positions  # `next_positions` needs them
        owners: list[tuple[Any, str]] = [(self.ring, "positions")]
        owners += [(self, name) for name in ("first_slots", "fixed_positions", "positions")]
        for owner, name in owners:
            tensor = getattr(owner, name)
            if tensor is None:
                continue
            if in_place and self.is_fixed:
                tensor.copy_(change(tensor))
            else:
                setattr(owner, name, change(tensor))

    def tensors(self) -> list[Tensor]:
        """Tensors kept between forwards, except the positions of the last one while slots grow."""
        tensors = (self.first_slots, self.fixed_positions, self.length, self.ring.positions)
        return [tensor for tensor in tensors if tensor is not None]

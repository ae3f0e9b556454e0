"""Where the tokens of a cache lie: how its sequences are padded, and the position of each token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

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


class TokenSlots:
    """What all layers of a cache have in common: the slots of its tokens.

    Slots count the tokens that entered, padding included; positions count the real ones of a
    sequence. `enter` is told of every forward before the layers run, and looks at the data only
    where a prompt or several tokens enter: a token that enters alone later on is real.

    Attributes:
        padding: the form of the padding so far; `any` stays.
        first_slots: int32 [batch], the slot of position 0 in each sequence; None if padding is `any`.
        positions: int64 [batch, slots], of every token of the last forward and before it; -1 for
            padding.
        query_positions: int64 [batch, new], of the tokens that entered last.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self.padding: Padding = "none"
        self.first_slots: Tensor | None = None
        self.positions: Tensor | None = None
        self.query_positions: Tensor | None = None

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
        total = seen + new
        if mask is not None:
            mask = self._fitting(mask, batch, total).to(device, torch.bool)
            if self.padding != "any" and (seen == 0 or new > 1):
                self.padding = padding_form(mask)
        places = torch.arange(total, device=device)
        if self.padding == "any":
            self.first_slots = None
            labels = places.expand(batch, total) if mask is None else positions_of(mask)
        elif self.padding == "left":
            if mask is not None:
                self.first_slots = (mask.cumsum(1) == 0).sum(1, dtype=torch.int32)
            assert self.first_slots is not None
            labels = (places - self.first_slots[:, None]).clamp(min=-1)
        else:
            if self.first_slots is None:
                self.first_slots = torch.zeros(batch, dtype=torch.int32, device=device)
            labels = places.expand(batch, total)
        self.positions, self.query_positions = labels, labels[:, seen:]

    @staticmethod
    def _fitting(mask: Tensor, batch: int, total: int) -> Tensor:
        if mask.shape[0] != batch or mask.shape[1] < total:
            raise RTPurboError(
                f"the attention mask is {tuple(mask.shape)}, but must be {(batch, total)}: "
                "it covers the tokens in the cache and the new ones."
            )
        return mask[:, :total]

    def next_positions(self, seen: int) -> Tensor:
        """The position int64 [batch] of the token that would follow the first `seen` slots."""
        if self.first_slots is not None:
            return (seen - self.first_slots.long()).clamp(min=0)
        assert self.positions is not None
        return self.positions[:, :seen].amax(1) + 1

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
        """Positions, query positions and first slots on a layer's device."""
        assert self.positions is not None
        assert self.query_positions is not None
        first_slots = None if self.first_slots is None else self.first_slots.to(device)
        return self.positions.to(device), self.query_positions.to(device), first_slots

    def select_rows(self, rows: Tensor) -> None:
        """Keeps these sequences, in this order."""
        self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def repeat_rows(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for name in ("first_slots", "positions", "query_positions"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, change(tensor))

    def num_bytes(self) -> int:
        """Bytes of what is kept between forwards; labels of a forward are not counted."""
        return 0 if self.first_slots is None else self.first_slots.nbytes

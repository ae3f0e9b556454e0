"""The tensors a layer's cache is made of: one that grows, and a ring that does not."""

from __future__ import annotations

import torch
from torch import Tensor

from rtpurbo.models.slots import RingSlots
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
            self._move(states, max(needed, self.reserve, capacity + capacity // 8))
        assert self.storage is not None
        self.storage[:, :, self.length : needed] = states
        self.length = needed
        return self.storage[:, :, :needed]

    def put(self, slot: Tensor, states: Tensor) -> Tensor:
        """Adds one token at a slot that only the device knows, and returns the whole capacity."""
        assert self.storage is not None
        self.storage.index_copy_(2, slot, states)
        self.length += 1
        return self.storage

    def set_capacity(self, capacity: int) -> None:
        """Makes room for so many tokens, no more and no less."""
        if self.storage is not None and self.storage.shape[2] != capacity:
            self._move(self.storage, capacity)

    def _move(self, like: Tensor, capacity: int) -> None:
        storage = like.new_zeros(like.shape[0], like.shape[1], capacity, like.shape[3])
        if self.storage is not None:
            storage[:, :, : self.length] = self.storage[:, :, : self.length]
        self.storage = storage


class RingBuffer:
    """Keys and values of bounded KV heads, [batch, heads, S + R + 1, dim], in the slots of a ring.

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
            values: likewise.
        """
        slots, device = self.slots, keys.device
        assert slots.entering is not None
        assert slots.labels is not None
        if self.keys is None or self.values is None:
            num_slots = slots.num_sink_tokens + slots.size + 1
            self.keys, self.values = (
                part.new_zeros(*part.shape[:2], num_slots, part.shape[3]) for part in (keys, values)
            )
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
            keys, values = self.keys[:, :, :-1], self.values[:, :, :-1]
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

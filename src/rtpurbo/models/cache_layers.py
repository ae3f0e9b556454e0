"""Cache layer of a sparse model: full KV heads that grow, and a ring buffer of sinks and window."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from rtpurbo.config import AttentionRule
from rtpurbo.errors import RTPurboError
from rtpurbo.models.ring import RingSlots
from rtpurbo.models.slots import TokenSlots
from rtpurbo.ops import HeadLayout, KeyValueStates, new_histogram_workspace
from rtpurbo.ops.eager.heavy_hitters import gather_tokens


def kept_tokens(seen: int, tokens: int) -> int:
    """Returns the number of tokens that are kept by `crop(tokens)`, in either of its meanings."""
    tokens = int(tokens)  # assisted decoding may count them in a tensor
    return max(0, seen + tokens) if tokens <= 0 else min(seen, tokens)


class GrowingBuffer:
    """A tensor [batch, heads, capacity, dim] that grows by an eighth when it is full."""

    def __init__(self, reserve: int = 0) -> None:
        self.reserve = reserve
        self.length = 0
        self.storage: Tensor | None = None

    def append(self, states: Tensor) -> Tensor:
        """Appends states [batch, heads, new, dim] and returns all states, as a view."""
        needed = self.length + states.shape[2]
        capacity = 0 if self.storage is None else self.storage.shape[2]
        if needed > capacity:
            self._move(states, max(needed, self.reserve, capacity + capacity // 8))
        assert self.storage is not None
        self.storage[:, :, self.length : needed] = states
        self.length = needed
        return self.storage[:, :, :needed]

    def put(self, slot: Tensor, states: Tensor) -> Tensor:
        """Writes one token to a slot int64 [1] on the device, and returns the whole storage."""
        assert self.storage is not None
        target, states = self.storage, states.to(self.storage.dtype)
        if target.element_size() == 1:  # index_copy_ supports uint8, but not float8
            target, states = target.view(torch.uint8), states.view(torch.uint8)
        target.index_copy_(2, slot, states)
        self.length += 1
        return self.storage

    def set_capacity(self, capacity: int) -> None:
        """Reallocates the storage for exactly this many tokens."""
        if self.storage is not None and self.storage.shape[2] != capacity:
            self._move(self.storage, capacity)

    def _move(self, like: Tensor, capacity: int) -> None:
        held = like if self.storage is None else self.storage
        storage = held.new_zeros(like.shape[0], like.shape[1], capacity, like.shape[3])
        if self.storage is not None:
            storage[:, :, : self.length] = self.storage[:, :, : self.length]
        self.storage = storage


class RingBuffer:
    """Ring buffer of windowed KV heads: keys and values [batch, heads, S + R + 1, dim].

    `RingSlots.begin_forward` runs before every `append`.
    """

    def __init__(self, slots: RingSlots) -> None:
        self.slots = slots
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> KeyValueStates:
        """Writes new tokens [batch, heads, new, head_dim], and returns the keys and values that their queries read."""
        slots, device = self.slots, keys.device
        assert slots.new_slots is not None
        if self.keys is None or self.values is None:
            num_slots = slots.num_sink_tokens + slots.size + 1
            self.keys, self.values = (
                part.new_zeros(*part.shape[:2], num_slots, part.shape[3]) for part in (keys, values)
            )
        # Autocast may have changed since the buffer was allocated.
        keys, values = keys.to(self.keys.dtype), values.to(self.values.dtype)
        before = None
        if slots.window is not None:
            # Read before the write below overwrites it.
            window = slots.window.to(device)
            window = window[:, None].expand(-1, keys.shape[1], -1)
            before = [gather_tokens(part, window) for part in (self.keys, self.values)]
        new_slots = slots.new_slots.to(device)[:, None, :, None]
        self.keys.scatter_(2, new_slots.expand(keys.shape), keys)
        self.values.scatter_(2, new_slots.expand(values.shape), values)
        if before is not None:
            sinks = slots.num_sink_tokens
            keys = torch.cat([self.keys[:, :, :sinks], before[0], keys], 2)
            values = torch.cat([self.values[:, :, :sinks], before[1], values], 2)
        elif keys.shape[2] == 1:
            return self.states()
        return self._with_positions(keys, values)

    def replace_sinks(self, first: int, prompt: KeyValueStates, slots: Tensor) -> None:
        """Overwrites the sinks from `first` on by tokens of the prompt.

        Their `slots` are int64 [batch, heads, tokens]; -1 keeps a sink.
        """
        for held, states in ((self.keys, prompt.keys), (self.values, prompt.values)):
            assert held is not None
            sinks = held[:, :, first : first + slots.shape[2]]
            chosen = gather_tokens(states, slots.clamp(min=0)).to(held.dtype)
            sinks.copy_(torch.where(slots[..., None] >= 0, chosen, sinks))

    def states(self) -> KeyValueStates:
        """Returns the keys and values that the query of the latest token reads."""
        assert self.keys is not None
        assert self.values is not None
        return self._with_positions(self.keys[:, :, :-1], self.values[:, :, :-1])

    def _with_positions(self, keys: Tensor, values: Tensor) -> KeyValueStates:
        slots, device = self.slots, keys.device
        assert slots.key_positions is not None
        first_slots, sink_slots = (
            None if tensor is None else tensor.to(device)
            for tensor in (slots.first_slots, slots.sink_slots)
        )
        return KeyValueStates(
            keys,
            values,
            slots.key_positions.to(device),
            in_order=slots.in_order,
            first_slots=first_slots,
            sink_slots=sink_slots,
        )


@dataclass(frozen=True)
class NewStates:
    """New keys and values that a cache layer passes to the attention function, which appends them.

    Attributes:
        layer: the cache layer.
        keys: [batch, num_key_value_heads, new, head_dim], after RoPE.
        values: shaped as `keys`.
    """

    layer: HeadwiseLayer
    keys: Tensor
    values: Tensor

    @property
    def shape(self) -> torch.Size:
        """Refuses the attention of dense models, which alone asks for a shape."""
        raise RTPurboError("a HeadwiseCache only works with a model that rtpurbo made sparse.")


class HeadwiseLayer(CacheLayerMixin):
    """Cache of a layer: full KV heads and their index keys grow, windowed KV heads are a ring buffer.

    All layers of the cache share `slots`; `reserve` are tokens to allocate at once for full KV heads.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, slots: TokenSlots, reserve: int = 0) -> None:
        super().__init__()
        self.slots = slots
        self._reserve = reserve
        self._clear()

    def _clear(self) -> None:
        self.full_keys, self.full_values, self.index_keys = (
            GrowingBuffer(self._reserve) for _ in range(3)
        )
        self.ring = RingBuffer(self.slots.ring)
        self.histogram_workspace: Tensor | None = None
        self.seen = 0
        self.is_initialized = False

    def check_rule(self, rule: AttentionRule) -> None:
        """Refuses a rule that reads keys which the ring buffer does not keep.

        Raises:
            RTPurboError: the window or the number of sinks is larger than that of the cache.
        """
        window, sinks = self.slots.ring.sliding_window, self.slots.ring.num_sink_tokens
        if rule.sliding_window > window or rule.num_sink_tokens > sinks:
            raise RTPurboError(
                f"the cache keeps a window of {window} and {sinks} sinks, but the rule now asks for "
                f"{rule.sliding_window} and {rule.num_sink_tokens}: make a new cache after set_rule."
            )

    def append(
        self,
        key_states: Tensor,
        value_states: Tensor,
        index_keys: Tensor | None,
        layout: HeadLayout,
    ) -> tuple[KeyValueStates, KeyValueStates]:
        """Appends tokens in the slots of `begin_forward`, and returns the keys and values of their queries.

        Args:
            key_states: [batch, num_key_value_heads, new, head_dim], after RoPE.
            value_states: shaped as `key_states`.
            index_keys: [batch, num_index_keys, new, index_dim] or None.
            layout: the layer's heads.

        Returns:
            States of the full and of the windowed KV heads.
        """
        self.is_initialized = True
        self.seen += key_states.shape[2]
        full, windowed = layout.full_key_value_heads, layout.windowed_key_value_heads
        newest = self.slots.newest

        def extended(buffer: GrowingBuffer, states: Tensor) -> Tensor:
            return buffer.append(states) if newest is None else buffer.put(newest, states)

        keys = extended(self.full_keys, key_states[:, full])
        values = extended(self.full_values, value_states[:, full])
        if index_keys is not None:
            index_keys = extended(self.index_keys, index_keys)
        return (
            self._full_states(keys, values, index_keys, layout),
            self.ring.append(key_states[:, windowed], value_states[:, windowed]),
        )

    def _full_states(
        self, keys: Tensor, values: Tensor, index_keys: Tensor | None, layout: HeadLayout
    ) -> KeyValueStates:
        slots, device = self.slots, keys.device
        assert slots.positions is not None
        # Beyond the tokens in use, fixed slots hold none: so they are not in order.
        in_order = slots.padding == "none" and slots.newest is None
        first_slots = (
            None if in_order or slots.first_slots is None else slots.first_slots.to(device)
        )
        return KeyValueStates(
            keys,
            values,
            slots.positions.to(device),
            index_keys,
            in_order,
            first_slots,
            length=None if slots.newest is None else slots.length,
            histogram_workspace=self._histograms(index_keys, layout),
        )

    def _histograms(self, index_keys: Tensor | None, layout: HeadLayout) -> Tensor | None:
        """Histogram workspace that keeps its contents between steps in fixed slots."""
        if index_keys is None or self.slots.newest is None:
            return None
        held, batch, heads = self.histogram_workspace, index_keys.shape[0], len(layout.retrieval)
        if held is None or held.shape[0] != batch * heads or held.device != index_keys.device:
            self.histogram_workspace = new_histogram_workspace(batch, heads, index_keys.device)
        return self.histogram_workspace

    def count_appended(self, layout: HeadLayout) -> tuple[KeyValueStates, KeyValueStates]:
        """Counts a token that a kernel wrote into its slots, and returns what `append` returns."""
        self.set_length(self.seen + 1)
        keys, values = self.full_keys.storage, self.full_values.storage
        assert keys is not None
        assert values is not None
        full = self._full_states(keys, values, self.index_keys.storage, layout)
        return full, self.ring.states()

    def make_static(self, capacity: int) -> None:
        """Sets the capacity of the full KV heads, in tokens."""
        for buffer in (self.full_keys, self.full_values, self.index_keys):
            buffer.set_capacity(capacity)

    def set_length(self, seen: int) -> None:
        """Sets the number of tokens held, after steps that ran on the device alone."""
        self.seen = seen
        for buffer in (self.full_keys, self.full_values, self.index_keys):
            if buffer.storage is not None:
                buffer.length = seen

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[NewStates, NewStates]:
        """Returns the new tokens for the attention function, which knows the heads and calls `append`."""
        states = NewStates(self, key_states, value_states)
        return states, states

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Buffers are made by the first `append`."""

    def held_tensors(self) -> Iterator[tuple[Any, str, Tensor]]:
        """Yields the owner, the attribute name and the value of every tensor."""
        owners = [(part, "storage") for part in (self.full_keys, self.full_values, self.index_keys)]
        for owner, name in [*owners, (self.ring, "keys"), (self.ring, "values")]:
            tensor = getattr(owner, name)
            if tensor is not None:
                yield owner, name, tensor

    def _map(self, change: Callable[[Tensor], Tensor], in_place: bool = False) -> None:
        for owner, name, tensor in self.held_tensors():
            if in_place:
                tensor.copy_(change(tensor))
            else:
                setattr(owner, name, change(tensor))

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """The mask covers every token seen: (length, offset)."""
        if isinstance(query_length, Tensor):  # positions of the new tokens, in transformers 5.0
            query_length = query_length.shape[0]
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Returns -1: the length is not limited."""
        return -1

    get_max_cache_shape = get_max_length  # transformers before 5.20

    def reset(self) -> None:
        """Removes all tokens and frees their memory."""
        self._clear()

    def crop(self, tokens: int) -> None:
        """Removes the last -`tokens` tokens (transformers >= 5.20), or keeps the first `tokens` (before).

        `HeadwiseCache.crop` updates the slots.
        """
        kept = kept_tokens(self.seen, tokens)
        if kept == 0:
            self._clear()
        else:
            self.set_length(kept)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the sequences, for beam search; fixed slots keep their addresses."""
        self._map(
            lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)),
            in_place=self.slots.is_fixed,
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence `repeats` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences."""
        self._map(lambda tensor: tensor[indices])

    def offload(self) -> None:
        """Moves the tensors to the CPU."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Does nothing: offloading back and forth is not supported."""

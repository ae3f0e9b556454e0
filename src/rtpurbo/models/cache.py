"""A key-value cache that is really smaller: full KV heads grow, the others live in a ring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from rtpurbo.config import AttentionRule, RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.buffers import GrowingBuffer, RingBuffer
from rtpurbo.models.families import convertible_layers
from rtpurbo.models.slots import Padding, RingSlots, TokenSlots
from rtpurbo.models.windowed import WindowedLayer
from rtpurbo.ops import HeadLayout, KeyValueStates

# Tokens that can be taken back (assisted decoding) after a ring has wrapped.
DEFAULT_CROP_SLACK = 64
# A static cache's capacity is a multiple of this.
CAPACITY_STEP = 256


def roomy_capacity(tokens: int, expected: int = 0) -> int:
    """Slots of a static cache for so many tokens: an eighth more, or what is expected if less.

    Args:
        tokens: to be held at once.
        expected: tokens that it is to hold in the end; 0 if unknown.
    """
    room = max(CAPACITY_STEP, tokens // 8)
    if expected > tokens:
        # A long answer is allowed more often than it is given.
        room = min(expected - tokens, max(room, 2048))
    return -(-(tokens + room) // CAPACITY_STEP) * CAPACITY_STEP


def kept_tokens(seen: int, tokens: int) -> int:
    """Tokens that are left of those seen after `crop(tokens)`, in either of its meanings."""
    return max(0, seen + tokens) if tokens <= 0 else min(seen, tokens)


class HeadwiseLayer(CacheLayerMixin):
    """A layer's cache: full KV heads grow, with index keys beside them; bounded ones are a ring.

    Args:
        slots: where the tokens of the cache lie, the same for all its layers.
        reserve: tokens to allocate at once for full KV heads.
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
        self.seen = 0
        self.is_initialized = False

    def check_rule(self, rule: AttentionRule) -> None:
        """Refuses a rule that would look for keys which the ring does not keep.

        Raises:
            RTPurboError: its window or its sinks are more than the cache was made for.
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
        """Adds tokens, of which the slots were told before, and returns what their queries may see.

        Args:
            key_states: [batch, num_key_value_heads, new, head_dim], after RoPE.
            value_states: likewise.
            index_keys: [batch, num_retrieval_heads, new, index_dim] or None.
            layout: the layer's heads.

        Returns:
            States of the full KV heads and of the bounded ones.
        """
        self.is_initialized = True
        self.seen += key_states.shape[2]
        full, bounded = layout.full_key_value_heads, layout.bounded_key_value_heads
        return (
            self._append_full(key_states[:, full], value_states[:, full], index_keys),
            self.ring.append(key_states[:, bounded], value_states[:, bounded]),
        )

    def _append_full(
        self, keys: Tensor, values: Tensor, index_keys: Tensor | None
    ) -> KeyValueStates:
        slots, device = self.slots, keys.device
        assert slots.positions is not None

        def grown(buffer: GrowingBuffer, states: Tensor) -> Tensor:
            return (
                buffer.append(states) if slots.newest is None else buffer.put(slots.newest, states)
            )

        # Beyond the tokens in use, fixed slots hold none: so they are not in order.
        in_order = slots.padding == "none" and slots.newest is None
        first_slots = (
            None if in_order or slots.first_slots is None else slots.first_slots.to(device)
        )
        return KeyValueStates(
            grown(self.full_keys, keys),
            grown(self.full_values, values),
            slots.positions.to(device),
            None if index_keys is None else grown(self.index_keys, index_keys),
            in_order,
            first_slots,
            length=None if slots.newest is None else slots.length,
        )

    def make_static(self, capacity: int) -> None:
        """Gives the full KV heads room for so many tokens at once."""
        for buffer in (self.full_keys, self.full_values, self.index_keys):
            buffer.set_capacity(capacity)

    def advance(self, steps: int) -> None:
        """Follows steps that the device has taken on its own, or takes back as many (negative)."""
        self.seen += steps
        for buffer in (self.full_keys, self.full_values, self.index_keys):
            if buffer.storage is not None:
                buffer.length += steps

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Not how a head-wise layer is filled: `append` needs to know the heads and positions."""
        raise RTPurboError("a HeadwiseCache only works with a model that rtpurbo made sparse.")

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Buffers are made by the first `append`."""

    def held_tensors(self) -> Iterator[tuple[Any, str, Tensor]]:
        """Every tensor: who holds it, under which name, and what it is."""
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

    def num_bytes(self) -> int:
        """Bytes of the tensors held, capacity and index keys included."""
        return sum(tensor.nbytes for _, _, tensor in self.held_tensors())

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask covers every token seen: (length, offset)."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """Unbounded."""
        return -1

    get_max_cache_shape = get_max_length  # transformers before 5.20

    def reset(self) -> None:
        """Forgets everything and frees its memory."""
        self._clear()

    def crop(self, tokens: int) -> None:
        """Takes back -`tokens` tokens (transformers >= 5.20), or keeps the first `tokens` (before).

        `HeadwiseCache.crop` sees to the slots.
        """
        kept = kept_tokens(self.seen, tokens)
        if kept == 0:
            self._clear()
            return
        self.seen = kept
        for buffer in (self.full_keys, self.full_values, self.index_keys):
            buffer.length = min(buffer.length, kept)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in a new order, for beam search; fixed slots keep their addresses."""
        self._map(
            lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)),
            in_place=self.slots.is_fixed,
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        self._map(lambda tensor: tensor[indices])

    def offload(self) -> None:
        """Moves the tensors to the CPU."""
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Offloading back and forth is not supported; the cache is small instead."""


class HeadwiseCache(Cache):
    """The cache of a sparse model, as `generate` expects it.

    Args:
        model: a model made sparse by `rtpurbo.sparsify` or `rtpurbo.load`.
        crop_slack: tokens that can be taken back (assisted decoding) once a window is full.
        reserve: tokens to allocate at once for KV heads kept whole; 0 grows as needed.

    Raises:
        RTPurboError: the model is not sparse.
    """

    def __init__(
        self, model: PreTrainedModel, crop_slack: int = DEFAULT_CROP_SLACK, reserve: int = 0
    ) -> None:
        config: RTPurboConfig | None = getattr(model, "rtpurbo_config", None)
        if config is None:
            raise RTPurboError(
                "a HeadwiseCache needs a sparse model: "
                "pass it through rtpurbo.sparsify or rtpurbo.load."
            )
        rule = config.attention
        self.slots = TokenSlots(RingSlots(rule.num_sink_tokens, rule.sliding_window, crop_slack))
        layers: list[CacheLayerMixin] = []
        for converted in convertible_layers(model.config):
            if converted:
                layers.append(HeadwiseLayer(self.slots, reserve))
            else:
                layers.append(WindowedLayer(self.slots, model.config.sliding_window))
        super().__init__(layers=layers)

    @property
    def padding(self) -> Padding:
        """How the sequences are padded: `none`, `left` or `any`."""
        return self.slots.padding

    @property
    def is_static(self) -> bool:
        """Whether `make_static` was called and still holds."""
        return self.slots.is_fixed

    def make_static(self, capacity: int) -> None:
        """Fixes the tensors for so many tokens, so that every step of one token is the same to the device.

        Where the step stands is counted on the device alone. Several tokens can still be added, and
        a larger capacity is taken if they need it.

        Args:
            capacity: slots for tokens, padding included.

        Raises:
            RTPurboError: nothing was read yet, or the sequences have padding between tokens.
        """
        seen = self.get_seq_length()
        if seen == 0 or capacity < seen:
            raise RTPurboError(
                f"a cache of {seen} tokens cannot be made static with room for {capacity}: "
                "read the prompt first, and leave it room."
            )
        if not self.can_be_static:
            raise RTPurboError(
                "a cache with padding between tokens, or in use for assisted decoding beside "
                "windowed layers, cannot be made static."
            )
        for layer in self.layers:
            if isinstance(layer, HeadwiseLayer):
                layer.make_static(capacity)
            else:
                layer.make_static()
        self.slots.fix(capacity, seen)

    @property
    def can_be_static(self) -> bool:
        """Whether all that a step changes can be counted on the device."""
        return self.padding != "any" and not any(
            getattr(layer, "record_past", False) for layer in self.layers
        )

    def advance(self, steps: int) -> None:
        """Follows steps that the device has taken on its own, or takes back as many (negative)."""
        self.slots.count_step(steps)
        for layer in self.layers:
            layer.advance(steps)

    def enter(
        self, mask: Tensor | None, batch: int, new: int, device: torch.device
    ) -> Tensor | dict[str, Tensor | None] | None:
        """Tells all layers of the tokens of a forward, before it runs.

        Args:
            mask: [batch, tokens seen and new], 1 for real tokens; None if what enters is real.
            batch: sequences.
            new: tokens of each.
            device: where they are.

        Returns:
            The mask that the forward still needs: none, but for layers with a window of their own
            behind padding or with fixed slots.
        """
        seen = self.get_seq_length()
        if self.is_static and seen + new > self.slots.capacity:
            self.make_static(roomy_capacity(seen + new))
        self.slots.enter(mask, batch, seen, new, device)
        windowed = [layer for layer in self.layers if isinstance(layer, WindowedLayer)]
        if not windowed:
            return None
        if self.slots.newest is not None:
            window = windowed[0].sliding_window
            return {"full_attention": None, "sliding_attention": self.slots.window_mask(window)}
        if self.padding == "none":
            return None
        if mask is None:
            assert self.slots.positions is not None
            return self.slots.positions >= 0
        return mask

    def reset(self) -> None:
        """Forgets everything and frees its memory."""
        super().reset()
        self.slots.clear()

    def crop(self, tokens: int) -> None:
        """Takes back -`tokens` tokens (transformers >= 5.20), or keeps the first `tokens` (before).

        Raises:
            RTPurboError: the ring no longer holds what the remaining tokens would see.
        """
        seen = self.get_seq_length()
        kept = kept_tokens(seen, tokens)
        if 0 < kept < seen:
            next_positions = self.slots.next_positions(kept)
            self.slots.ring.check_whole_before(next_positions)
            super().crop(tokens)
            self.slots.ring.forget_from(next_positions)
            return
        super().crop(tokens)
        if kept == 0:
            self.slots.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in a new order, for beam search; a static cache keeps its addresses."""
        super().reorder_cache(beam_idx)
        self.slots.map_rows(
            lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)), in_place=True
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.slots.map_rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        super().batch_select_indices(indices)
        self.slots.map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def num_bytes(self) -> int:
        """Bytes of every tensor the cache holds."""
        total = sum(tensor.nbytes for tensor in self.slots.tensors())
        for layer in self.layers:
            if isinstance(layer, HeadwiseLayer):
                total += layer.num_bytes()
            else:
                total += sum(
                    part.numel() * part.element_size()
                    for part in (layer.keys, layer.values)
                    if part is not None
                )
        return total

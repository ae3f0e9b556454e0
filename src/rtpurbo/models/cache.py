"""A key-value cache that is really smaller: full KV heads grow, the others live in a ring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from rtpurbo.config import RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.families import convertible_layers
from rtpurbo.ops import HeadLayout, KeyValueStates

# Tokens that can be taken back (assisted decoding) after a ring has wrapped.
DEFAULT_CROP_SLACK = 64


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

    def append(self, keys: Tensor, values: Tensor, positions: Tensor) -> KeyValueStates:
        """Adds tokens and returns what their queries may see: the old ring and the new tokens.

        Args:
            keys: [batch, heads, new, head_dim].
            values: likewise.
            positions: int64 [batch, new], -1 for padding.
        """
        if self.keys is None:
            batch, heads, new, _ = keys.shape
            slots = self.num_sink_tokens + self.size + 1
            self.keys = keys.new_zeros(batch, heads, slots, keys.shape[-1])
            self.values = values.new_zeros(batch, heads, slots, values.shape[-1])
            self.positions = positions.new_full((batch, slots), -1)
            self._write(keys, values, positions)
            if new > 1:
                return KeyValueStates(keys, values, positions)
        elif keys.shape[2] == 1:
            self._write(keys, values, positions)
        else:
            held = self._held()
            seen = KeyValueStates(
                torch.cat([held.keys, keys], 2),
                torch.cat([held.values, values], 2),
                torch.cat([held.positions, positions], 1),
            )
            self._write(keys, values, positions)
            return seen
        return self._held()

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
        first = (limit - self.sliding_window + 1).clamp(min=0)
        present = ((positions >= first) & (positions < limit)).sum(1)
        if bool((present < (limit - first)[:, 0]).any()):
            raise RTPurboError(
                f"the cache can take back at most {self.size - self.sliding_window} tokens once "
                "its window is full; create it with a larger crop_slack."
            )
        self.positions.masked_fill_(self.positions >= limit, -1)


class HeadwiseLayer(CacheLayerMixin):
    """A layer's cache: full KV heads grow, with index keys beside them; bounded ones are a ring.

    Args:
        rule_window: W of the attention rule.
        num_sink_tokens: S of the attention rule.
        crop_slack: tokens that can be taken back after the ring has wrapped.
        reserve: tokens to allocate at once for full KV heads.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self, rule_window: int, num_sink_tokens: int, crop_slack: int, reserve: int = 0
    ) -> None:
        super().__init__()
        self._arguments = (rule_window, num_sink_tokens, crop_slack, reserve)
        self._clear()

    def _clear(self) -> None:
        window, sinks, slack, reserve = self._arguments
        self.full_keys, self.full_values, self.index_keys = (
            GrowingBuffer(reserve) for _ in range(3)
        )
        self.ring = RingBuffer(sinks, window, slack)
        self.seen = 0
        self.next_positions: Tensor | None = None
        self.is_initialized = False

    def append(
        self,
        key_states: Tensor,
        value_states: Tensor,
        index_keys: Tensor | None,
        positions: Tensor,
        layout: HeadLayout,
        in_order: bool,
    ) -> tuple[KeyValueStates, KeyValueStates]:
        """Adds tokens and returns what their queries may see: (full KV heads, bounded KV heads).

        Args:
            key_states: [batch, num_key_value_heads, new, head_dim], after RoPE.
            value_states: likewise.
            index_keys: [batch, num_retrieval_heads, new, index_dim] or None.
            positions: int64 [batch, seen + new], of every token so far; -1 for padding.
            layout: the layer's heads.
            in_order: no sequence is padded.
        """
        new = key_states.shape[2]
        self.is_initialized = True
        self.seen += new
        self.next_positions = positions.amax(1) + 1
        full = KeyValueStates(
            self.full_keys.append(key_states[:, layout.full_key_value_heads]),
            self.full_values.append(value_states[:, layout.full_key_value_heads]),
            positions,
            None if index_keys is None else self.index_keys.append(index_keys),
            in_order,
        )
        heads = layout.bounded_key_value_heads
        bounded = self.ring.append(
            key_states[:, heads], value_states[:, heads], positions[:, -new:]
        )
        return full, bounded

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Not how a head-wise layer is filled: `append` needs to know the heads and positions."""
        raise RTPurboError("a HeadwiseCache only works with a model that rtpurbo made sparse.")

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Buffers are made by the first `append`."""

    def _tensors(self) -> Iterator[tuple[Any, str]]:
        for buffer in (self.full_keys, self.full_values, self.index_keys):
            yield buffer, "storage"
        for name in ("keys", "values", "positions"):
            yield self.ring, name
        yield self, "next_positions"

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        for owner, name in self._tensors():
            tensor = getattr(owner, name)
            if tensor is not None:
                setattr(owner, name, change(tensor))

    def num_bytes(self) -> int:
        """Bytes of the tensors held, capacity and index keys included."""
        tensors = (getattr(owner, name) for owner, name in self._tensors())
        return sum(
            tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None
        )

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

        Raises:
            RTPurboError: the ring no longer holds what the remaining tokens would see.
        """
        removed = -tokens if tokens <= 0 else max(0, self.seen - tokens)
        if removed == 0 or not self.is_initialized:
            return
        if removed >= self.seen:
            self._clear()
            return
        assert self.next_positions is not None
        remaining = (self.next_positions - removed).clamp(min=0)
        self.ring.forget_from(remaining)
        self.next_positions = remaining
        self.seen -= removed
        for buffer in (self.full_keys, self.full_values, self.index_keys):
            buffer.length = min(buffer.length, self.seen)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in a new order, for beam search."""
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

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
        layers: list[CacheLayerMixin] = []
        for converted in convertible_layers(model.config):
            if converted:
                layers.append(
                    HeadwiseLayer(rule.sliding_window, rule.num_sink_tokens, crop_slack, reserve)
                )
            else:
                layers.append(DynamicSlidingWindowLayer(sliding_window=model.config.sliding_window))
        super().__init__(layers=layers)

    def num_bytes(self) -> int:
        """Bytes of every tensor the cache holds."""
        total = 0
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

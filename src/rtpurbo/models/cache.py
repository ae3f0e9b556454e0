"""A key-value cache that is really smaller: full KV heads grow, the others live in a ring."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from rtpurbo.config import AttentionRule, RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.buffers import GrowingBuffer, RingBuffer
from rtpurbo.models.families import convertible_layers
from rtpurbo.models.slots import Padding, TokenSlots
from rtpurbo.ops import HeadLayout, KeyValueStates

# Tokens that can be taken back (assisted decoding) after a ring has wrapped.
DEFAULT_CROP_SLACK = 64


class HeadwiseLayer(CacheLayerMixin):
    """A layer's cache: full KV heads grow, with index keys beside them; bounded ones are a ring.

    Args:
        slots: where the tokens of the cache lie, the same for all its layers.
        rule_window: W of the attention rule.
        num_sink_tokens: S of the attention rule.
        crop_slack: tokens that can be taken back after the ring has wrapped.
        reserve: tokens to allocate at once for full KV heads.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        slots: TokenSlots,
        rule_window: int,
        num_sink_tokens: int,
        crop_slack: int,
        reserve: int = 0,
    ) -> None:
        super().__init__()
        self.slots = slots
        self._arguments = (rule_window, num_sink_tokens, crop_slack, reserve)
        self._clear()

    def _clear(self) -> None:
        window, sinks, slack, reserve = self._arguments
        self.full_keys, self.full_values, self.index_keys = (
            GrowingBuffer(reserve) for _ in range(3)
        )
        self.ring = RingBuffer(sinks, window, slack)
        self.seen = 0
        self.is_initialized = False

    def check_rule(self, rule: AttentionRule) -> None:
        """Refuses a rule that would look for keys which the ring does not keep.

        Raises:
            RTPurboError: its window or its sinks are more than the cache was made for.
        """
        window, sinks, _, _ = self._arguments
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
        seen, device = self.seen, key_states.device
        self.is_initialized = True
        self.seen += key_states.shape[2]
        positions, query_positions, first_slots = self.slots.on(device)
        in_order = self.slots.padding == "none"
        heads = layout.full_key_value_heads
        full = KeyValueStates(
            self.full_keys.append(key_states[:, heads]),
            self.full_values.append(value_states[:, heads]),
            positions,
            None if index_keys is None else self.index_keys.append(index_keys),
            in_order,
            None if in_order else first_slots,
        )
        heads = layout.bounded_key_value_heads
        bounded = self.ring.append(
            key_states[:, heads], value_states[:, heads], query_positions, first_slots, seen
        )
        if in_order and seen == 0 and query_positions.shape[1] > 1:
            bounded = replace(bounded, in_order=True, first_slots=None)
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
        self.ring.forget_from(self.slots.next_positions(self.seen - removed))
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
        rule, self.slots = config.attention, TokenSlots()
        layers: list[CacheLayerMixin] = []
        for converted in convertible_layers(model.config):
            if converted:
                layers.append(
                    HeadwiseLayer(
                        self.slots, rule.sliding_window, rule.num_sink_tokens, crop_slack, reserve
                    )
                )
            else:
                layers.append(DynamicSlidingWindowLayer(sliding_window=model.config.sliding_window))
        super().__init__(layers=layers)

    @property
    def padding(self) -> Padding:
        """How the sequences are padded: `none`, `left` or `any`."""
        return self.slots.padding

    def enter(
        self, mask: Tensor | None, batch: int, new: int, device: torch.device
    ) -> Tensor | None:
        """Tells all layers of the tokens of a forward, before it runs.

        Args:
            mask: [batch, tokens seen and new], 1 for real tokens; None if what enters is real.
            batch: sequences.
            new: tokens of each.
            device: where they are.

        Returns:
            The mask that the forward still needs: none, but for layers with a window of their own
            behind padding.
        """
        self.slots.enter(mask, batch, self.get_seq_length(), new, device)
        if self.padding == "none" or all(isinstance(layer, HeadwiseLayer) for layer in self.layers):
            return None
        if mask is None:
            assert self.slots.positions is not None
            return self.slots.positions >= 0
        return mask

    def reset(self) -> None:
        """Forgets everything and frees its memory."""
        super().reset()
        self.slots.clear()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """As `HeadwiseLayer.crop`, in every layer."""
        super().crop(*args, **kwargs)
        if self.get_seq_length() == 0:
            self.slots.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in a new order, for beam search."""
        super().reorder_cache(beam_idx)
        self.slots.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.slots.repeat_rows(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        super().batch_select_indices(indices)
        self.slots.select_rows(indices)

    def num_bytes(self) -> int:
        """Bytes of every tensor the cache holds."""
        total = self.slots.num_bytes()
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

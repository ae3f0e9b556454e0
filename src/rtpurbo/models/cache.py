"""KV cache of a sparse model: full KV heads grow, windowed ones are ring buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from rtpurbo.config import DEFAULT_CROP_SLACK, RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import layer_types
from rtpurbo.models.cache_layers import HeadwiseLayer, kept_tokens
from rtpurbo.models.ring import RingSlots
from rtpurbo.models.slots import Padding, TokenSlots, WindowedPositions
from rtpurbo.models.windowed_layer import WindowedLayer

# A static cache's capacity is a multiple of this.
CAPACITY_STEP = 256


def roomy_capacity(tokens: int, expected: int = 0) -> int:
    """Returns the slots of a static cache for this many tokens: an eighth more, or up to the expected number.

    That is the number of tokens in the end; 0 if unknown.
    """
    room = max(CAPACITY_STEP, tokens // 8)
    if expected > tokens:
        # Most answers are shorter than the limit.
        room = min(expected - tokens, max(room, 2048))
    return -(-(tokens + room) // CAPACITY_STEP) * CAPACITY_STEP


class HeadwiseCache(Cache):
    """Cache of a sparse model, for `generate` and plain calls.

    Args:
        model: a model made sparse by `rtpurbo.sparsify` or `rtpurbo.load`.
        crop_slack: tokens that can be removed (assisted decoding) once a window is full.
        reserve: tokens to allocate at once for full KV heads; 0 grows as needed.

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
        # Layers that are not converted keep the layers of transformers, such as recurrent states.
        layers: list[CacheLayerMixin] = DynamicCache(config=model.config).layers
        for number, kind in enumerate(layer_types(model.config)):
            if config.head_map.retrieval_heads[number] is not None:
                layers[number] = headwise_layer(layers[number], self.slots, reserve)
            elif kind == "sliding_attention":
                layers[number] = WindowedLayer(self.slots, model.config.sliding_window)
        super().__init__(layers=layers)
        self._first = next(layer for layer in layers if isinstance(layer, HeadwiseLayer))
        # Number of tokens in the end, if `generate` knows it.
        self.expected_length = 0

    @property
    def padding(self) -> Padding:
        """Padding of the sequences: `none`, `left` or `any`."""
        return self.slots.padding

    @property
    def is_static(self) -> bool:
        """True if `make_static` was called and is still in effect."""
        return self.slots.is_fixed

    def make_static(self, capacity: int) -> None:
        """Fixes the tensors for this many tokens, so that every decode step runs the same operations.

        The sequence length is kept on the device. Several tokens can still be appended, and the
        capacity grows if they need it.

        Args:
            capacity: slots for tokens, padding included.

        Raises:
            RTPurboError: the cache is empty, or the sequences have padding between tokens.
        """
        seen = self.get_seq_length()
        if seen == 0 or capacity < seen:
            raise RTPurboError(
                f"a cache of {seen} tokens cannot be made static with room for {capacity}: "
                "read the prompt first, and leave it room."
            )
        if not self.can_be_static:
            raise RTPurboError(
                "a cache with padding between tokens, beside layers with recurrent states, or in use for "
                "assisted decoding beside windowed layers, cannot be made static."
            )
        for layer in self.layers:
            layer.make_static(capacity)
        self.slots.fix(capacity, seen)

    @property
    def can_be_static(self) -> bool:
        """True if `make_static` is supported."""
        return self.padding != "any" and all(
            type(layer) in (HeadwiseLayer, WindowedLayer)
            and not getattr(layer, "record_past", False)
            for layer in self.layers
        )

    def make_growing(self) -> None:
        """Undoes `make_static`; the capacity is kept."""
        self.slots.release()

    def set_length(self, seen: int) -> None:
        """Sets the number of tokens held, after steps that ran on the device alone."""
        self.slots.set_length(seen)
        for layer in self.layers:
            layer.set_length(seen)

    def rewind(self, seen: int) -> None:
        """Sets a static cache back to before one decode step, which may then run again."""
        self.set_length(seen)
        self.slots.rewind(seen)

    def begin_forward(
        self, mask: Tensor | None, batch: int, new: int, device: torch.device
    ) -> Tensor | dict[str, WindowedPositions | None] | None:
        """Assigns slots to the new tokens of a forward, before it runs.

        Args:
            mask: [batch, seen + new], 1 for real tokens; None if the new tokens are real.
            batch: number of sequences.
            new: new tokens of each.
            device: device of the tokens.

        Returns:
            The attention mask for the layers that are not converted; None if they need none.
        """
        seen = self.get_seq_length()
        if self.is_static and seen + new > self.slots.capacity:
            self.make_static(roomy_capacity(seen + new))
        self.slots.begin_forward(mask, batch, seen, new, device)
        others = [layer for layer in self.layers if type(layer) is not HeadwiseLayer]
        if not others:
            return None
        if self.slots.newest is not None:
            window = others[0].sliding_window
            return {
                "full_attention": None,
                "sliding_attention": self.slots.window_positions(window),
            }
        if self.padding == "none":
            return None
        if mask is None:
            assert self.slots.positions is not None
            return self.slots.positions >= 0
        return mask

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of tokens, padding included, which is the same in every layer."""
        return self._first.seen

    def reset(self) -> None:
        """Removes all tokens and frees their memory."""
        super().reset()
        self.slots.clear()

    def crop(self, tokens: int) -> None:
        """Removes the last -`tokens` tokens (transformers >= 5.20), or keeps the first `tokens` (before).

        Raises:
            RTPurboError: a window of the remaining tokens is no longer held, or a layer of transformers cannot be
                cropped; in the latter case other layers may have been, so that the cache cannot be used any more.
        """
        seen = self.get_seq_length()
        kept = kept_tokens(seen, tokens)
        next_positions = self.slots.next_positions(kept) if 0 < kept < seen else None
        if next_positions is not None:
            self.slots.ring.check_whole_before(next_positions)
        try:
            super().crop(tokens)
        except (RuntimeError, ValueError) as error:
            raise RTPurboError(
                "a layer with a window or a state of its own cannot take tokens back: read the remaining "
                "ones into a new cache."
            ) from error
        if next_positions is not None:
            self.slots.take_back(next_positions)
        elif kept == 0:
            self.slots.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the sequences, for beam search; a static cache keeps its addresses."""
        super().reorder_cache(beam_idx)
        self.slots.map_rows(
            lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)), in_place=True
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sequence `repeats` times."""
        super().batch_repeat_interleave(repeats)
        self.slots.map_rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences."""
        super().batch_select_indices(indices)
        self.slots.map_rows(lambda tensor: tensor[indices.to(tensor.device)])

    def num_bytes(self) -> int:
        """Returns the size of all tensors of the cache in bytes."""
        total = sum(tensor.nbytes for tensor in self.slots.tensors())
        return total + sum(tensor.nbytes for layer in self.layers for tensor in _tensors(layer))


def _tensors(layer: Any) -> Iterator[Tensor]:
    """Yields the tensors of a cache layer."""
    if isinstance(layer, HeadwiseLayer):
        yield from (tensor for _, _, tensor in layer.held_tensors())
    for name in ("keys", "values", "conv_states", "recurrent_states"):
        held = getattr(layer, name, None)
        for tensor in held.values() if isinstance(held, dict) else [held]:
            if isinstance(tensor, Tensor):
                yield tensor


def headwise_layer(original: CacheLayerMixin, slots: TokenSlots, reserve: int) -> HeadwiseLayer:
    """Returns the sparse layer that replaces one of transformers, which may have a recurrent state too."""
    if not hasattr(original, "recurrent_states"):
        return HeadwiseLayer(slots, reserve)
    from rtpurbo.models.hybrid_layer import HybridLayer

    return HybridLayer(slots, reserve, original.number_of_states)

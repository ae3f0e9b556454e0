"""Cache of a layer with attention and a recurrent state, as in Falcon-H1."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from rtpurbo.models.cache_layers import HeadwiseLayer
from rtpurbo.models.slots import TokenSlots


class HybridLayer(HeadwiseLayer, LinearAttentionLayer):
    """A head-wise cache beside transformers' recurrent state; arguments are those of both."""

    is_croppable = False

    def __init__(self, slots: TokenSlots, reserve: int, number_of_states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        HeadwiseLayer.__init__(self, slots, reserve)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Allocates the recurrent state; the first `append` allocates keys and values."""
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        """Removes all tokens and states."""
        LinearAttentionLayer.reset(self)
        HeadwiseLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorders the sequences, for beam search."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        HeadwiseLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens: int) -> None:
        """Removes tokens; transformers refuses it if the recurrent state does not support it."""
        LinearAttentionLayer.crop(self, tokens)
        HeadwiseLayer.crop(self, tokens)

    def offload(self) -> None:
        """Moves the tensors to the CPU."""
        LinearAttentionLayer.offload(self)
        HeadwiseLayer.offload(self)

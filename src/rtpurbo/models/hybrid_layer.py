"""The cache of a layer that attends and keeps a recurrent state too, as those of Falcon-H1 do."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from rtpurbo.models.cache_layers import HeadwiseLayer
from rtpurbo.models.slots import TokenSlots


class HybridLayer(HeadwiseLayer, LinearAttentionLayer):
    """A head-wise cache beside transformers' recurrent state.

    Args:
        slots: where the tokens of the cache lie.
        reserve: tokens to allocate at once for full KV heads.
        number_of_states: recurrent states of the layer.
    """

    is_croppable = False

    def __init__(self, slots: TokenSlots, reserve: int, number_of_states: int) -> None:
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)
        HeadwiseLayer.__init__(self, slots, reserve)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Makes the recurrent state; the head-wise buffers are made by the first `append`."""
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)

    def reset(self) -> None:
        """Forgets everything."""
        LinearAttentionLayer.reset(self)
        HeadwiseLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in a new order, for beam search."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        HeadwiseLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens: int) -> None:
        """Takes tokens back; transformers says whether a recurrent state can do so."""
        LinearAttentionLayer.crop(self, tokens)
        HeadwiseLayer.crop(self, tokens)

    def offload(self) -> None:
        """Moves the tensors to the CPU."""
        LinearAttentionLayer.offload(self)
        HeadwiseLayer.offload(self)

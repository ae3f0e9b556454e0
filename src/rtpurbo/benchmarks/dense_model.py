"""Dense model at full speed: a named attention kernel, no mask, and a full static cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface

from rtpurbo.benchmarks import sdpa
from rtpurbo.models.architecture import AttentionShape, attention_shapes

IMPLEMENTATION = "rtpurbo-benchmark"


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)


@contextmanager
def attending(model: PreTrainedModel, attend: sdpa.Attention) -> Iterator[None]:
    """Context manager that replaces the attention of a dense model; without a mask, as nothing is padded."""

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        return attend(query, key, value, scaling).transpose(1, 2).contiguous(), None

    AttentionInterface.register(IMPLEMENTATION, attention)
    before = model.config._attn_implementation
    model.config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        model.config._attn_implementation = before


class FullLayer(CacheLayerMixin):
    """Layer of a full cache, in which every step overwrites the last slot."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.is_initialized = True

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the layer is initialised when it is created."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes one token and returns everything."""
        assert self.keys is not None
        assert self.values is not None
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Number of tokens before the one that is written."""
        assert self.keys is not None
        return self.keys.shape[2] - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask."""
        return self.get_seq_length() + 1, 0

    def get_max_length(self) -> int:
        """Capacity of the layer."""
        return self.get_seq_length() + 1

    get_max_cache_shape = get_max_length  # transformers before 5.20


def full_cache(model: PreTrainedModel, length: int, batch: int) -> Cache:
    """Cache of a dense model, full of random states."""
    config = model.config

    def states(shape: AttentionShape) -> Tensor:
        size = (batch, shape.num_key_value_heads, length, shape.head_dim)
        return torch.randn(size, dtype=model.dtype, device=model.device)

    shapes = attention_shapes(config).values()
    return Cache(layers=[FullLayer(states(shape), states(shape)) for shape in shapes])

"""Shape of a layer to measure, and random inputs for its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.errors import RTPurboError
from rtpurbo.ops import HeadLayout, KeyValueStates


@dataclass(frozen=True)
class LayerShape:
    """Heads of a layer.

    Attributes:
        num_attention_heads: query heads.
        num_key_value_heads: KV heads.
        head_dim: dimensions of a head.
        retrieval_heads: retrieval heads (query heads), ascending.
        index_dim: dimensions of index queries and keys.
        shared_keys: one index key per KV head with retrieval heads, instead of one per retrieval
            head.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    retrieval_heads: tuple[int, ...]
    index_dim: int = 16
    shared_keys: bool = False

    @classmethod
    def spread(
        cls,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        num_retrieval_heads: int,
    ) -> LayerShape:
        """Layer with evenly spaced retrieval heads.

        Raises:
            RTPurboError: the numbers of heads do not fit together.
        """
        if num_attention_heads % num_key_value_heads:
            raise RTPurboError(
                f"{num_attention_heads} query heads cannot share {num_key_value_heads} KV heads "
                "evenly: choose --heads as a multiple of --kv-heads."
            )
        if num_retrieval_heads > num_attention_heads:
            raise RTPurboError(
                f"--retrieval-heads is {num_retrieval_heads}, but a layer has only "
                f"{num_attention_heads} query heads."
            )
        heads = tuple(
            (2 * number + 1) * num_attention_heads // (2 * num_retrieval_heads)
            for number in range(num_retrieval_heads)
        )
        return cls(num_attention_heads, num_key_value_heads, head_dim, heads)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def scaling(self) -> float:
        """Factor on the dot products."""
        return self.head_dim**-0.5

    @property
    def num_index_keys(self) -> int:
        """Index keys per token."""
        if not self.shared_keys:
            return len(self.retrieval_heads)
        return len({head // self.group for head in self.retrieval_heads})

    def whole_groups(self) -> tuple[int, ...]:
        """Query heads of all GQA groups with a retrieval head."""
        groups = {head // self.group for head in self.retrieval_heads}
        return tuple(
            head for head in range(self.num_attention_heads) if head // self.group in groups
        )

    def facts(
        self, phase: str, states: LayerStates, rule: AttentionRule, density: float, **others: Any
    ) -> dict[str, Any]:
        """Record fields that are known before the measurement; `others` replace some of them."""
        return {
            "phase": phase,
            "context_length": states.length,
            "batch_size": states.keys.shape[0],
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "num_retrieval_heads": len(self.retrieval_heads),
            "head_dim": self.head_dim,
            "sliding_window": rule.sliding_window,
            "retrieval_window": rule.near_window,
            "density": round(density, 4),
            "dtype": dtype_name(states.queries.dtype),
            **others,
        }

    def layout(
        self, device: torch.device, retrieval_heads: Sequence[int] | None = None
    ) -> HeadLayout:
        """Head layout, optionally with other retrieval heads."""
        heads = self.retrieval_heads if retrieval_heads is None else retrieval_heads
        return HeadLayout.build(heads, self.num_attention_heads, self.num_key_value_heads, device)


@dataclass
class LayerStates:
    """Inputs of a layer's attention.

    Attributes:
        queries: [batch, num_attention_heads, q_len, head_dim].
        keys: [batch, num_key_value_heads, k_len, head_dim].
        values: same shape.
        index_queries: [batch, num_retrieval_heads, q_len, index_dim].
        index_keys: [batch, num_index_keys, k_len, index_dim].
        scaling: factor on the dot products.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    index_queries: Tensor
    index_keys: Tensor
    scaling: float

    @classmethod
    def random(
        cls,
        shape: LayerShape,
        q_len: int,
        k_len: int,
        dtype: torch.dtype,
        device: torch.device,
        batch: int = 1,
        seed: int = 0,
    ) -> LayerStates:
        """Normally distributed states; index states are in the dtype of the cache."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(heads: int, length: int, dim: int, kind: torch.dtype) -> Tensor:
            size = (batch, heads, length, dim)
            return torch.randn(size, generator=generator, dtype=kind, device=device)

        index_dtype = index_dtype_of(dtype)
        return cls(
            normal(shape.num_attention_heads, q_len, shape.head_dim, dtype),
            normal(shape.num_key_value_heads, k_len, shape.head_dim, dtype),
            normal(shape.num_key_value_heads, k_len, shape.head_dim, dtype),
            normal(len(shape.retrieval_heads), q_len, shape.index_dim, index_dtype),
            normal(shape.num_index_keys, k_len, shape.index_dim, index_dtype),
            shape.scaling,
        )

    @property
    def length(self) -> int:
        """Tokens in the context."""
        return self.keys.shape[2]

    @property
    def positions(self) -> Tensor:
        """Key positions, int64 [batch, k_len]."""
        return torch.arange(self.length, device=self.keys.device).expand(self.keys.shape[0], -1)

    def divided(self, layout: HeadLayout) -> tuple[KeyValueStates, KeyValueStates]:
        """States of the full and of the windowed KV heads, without copies where possible."""

        def some(heads: Tensor, index_keys: Tensor | None) -> KeyValueStates:
            whole = heads.numel() == self.keys.shape[1]
            keys, values = (part if whole else part[:, heads] for part in (self.keys, self.values))
            return KeyValueStates(keys, values, self.positions, index_keys, in_order=True)

        return (
            some(layout.full_key_value_heads, self.index_keys),
            some(layout.windowed_key_value_heads, None),
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Name of a dtype in records, as in "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def index_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """Dtype of index states in a model of this dtype."""
    return torch.float16 if dtype == torch.bfloat16 else dtype

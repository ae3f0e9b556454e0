"""Heads of a rank under tensor parallelism, and the bytes of a token in their caches."""

from __future__ import annotations

from dataclasses import dataclass

from rtpurbo.config import HeadMap, RTPurboConfig
from rtpurbo.errors import RTPurboError

FLOAT8_CACHE_DTYPES = ("fp8", "fp8_e4m3")
"""Values of `--kv-cache-dtype` with which keys and values are stored as float8_e4m3fn."""


@dataclass(frozen=True)
class LayerHeads:
    """Heads of one layer on one rank, numbered from the first one of the rank.

    Attributes:
        retrieval: retrieval heads.
        num_attention_heads: query heads of the rank.
        num_key_value_heads: KV heads of the rank.
    """

    retrieval: tuple[int, ...]
    num_attention_heads: int
    num_key_value_heads: int

    @property
    def num_full(self) -> int:
        """Number of full KV heads."""
        group = self.num_attention_heads // self.num_key_value_heads
        return len({head // group for head in self.retrieval})

    @property
    def num_windowed(self) -> int:
        """Number of windowed KV heads."""
        return self.num_key_value_heads - self.num_full

    def num_index_keys(self, shared: bool) -> int:
        """Number of index keys of a token: one per full KV head if they are shared, else one per retrieval head."""
        return self.num_full if shared else len(self.retrieval)


def heads_of_rank(head_map: HeadMap, rank: int = 0, world_size: int = 1) -> list[LayerHeads]:
    """Consecutive query and KV heads of every layer that tensor parallelism assigns to a rank.

    Raises:
        RTPurboError: the number of heads is not divisible by `world_size`.
    """
    of_layers = []
    for layer, heads in enumerate(head_map.retrieval_heads):
        query_heads, kv_heads = head_map.num_query_heads(layer), head_map.num_kv_heads(layer)
        if kv_heads % world_size or query_heads % world_size:
            raise RTPurboError(
                f"{query_heads} query heads and {kv_heads} KV heads cannot be divided among "
                f"{world_size} ranks: choose a tensor parallel size that divides both."
            )
        per_rank = query_heads // world_size
        mine = range(rank * per_rank, (rank + 1) * per_rank)
        retrieval = tuple(head - mine.start for head in heads or () if head in mine)
        of_layers.append(LayerHeads(retrieval, per_rank, kv_heads // world_size))
    return of_layers


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of a token of one head in the cache.

    Attributes:
        key_value: bytes of key and value of a KV head.
        index: bytes of an index key.
        shares_index: the retrieval heads of a KV head share one index key.
    """

    key_value: int
    index: int
    shares_index: bool = False

    @classmethod
    def of(
        cls,
        config: RTPurboConfig,
        head_dim: int,
        bytes_per_element: int,
        cache_dtype: str = "auto",
    ) -> TokenBytes:
        """Sizes for a model; index keys of bfloat16 models are float16.

        Args:
            config: attention rule and indexer settings.
            head_dim: dimensions of a head.
            bytes_per_element: size of an element in the model's dtype.
            cache_dtype: dtype of keys and values as in vLLM's `--kv-cache-dtype`; others than
                `FLOAT8_CACHE_DTYPES` are the model's.
        """
        indexer = config.indexer
        index_bytes = 1 if config.attention.index_storage == "float8" else bytes_per_element
        key_value_bytes = 1 if cache_dtype in FLOAT8_CACHE_DTYPES else bytes_per_element
        return cls(
            2 * head_dim * key_value_bytes, indexer.index_dim * index_bytes, indexer.shared_keys
        )

    def full(self, heads: LayerHeads) -> int:
        """Bytes of a token of a layer in the full group."""
        index_keys = heads.num_index_keys(self.shares_index)
        return heads.num_full * self.key_value + index_keys * self.index

    def windowed(self, heads: LayerHeads) -> int:
        """Bytes of a token of a layer in a windowed group."""
        return heads.num_windowed * self.key_value

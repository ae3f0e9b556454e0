"""How a sparse model's KV cache is laid out in vLLM's blocks, and how many tokens fit into it.

vLLM has one pool of blocks of equal size. A *group* is a set of layers that share a block table: one
group holds the full KV heads of all layers with their index keys and keeps every token, the
*windowed* groups hold the other KV heads and keep sinks and window. A block belongs to one group at a
time, so the largest group decides the size of a block, and what a smaller one leaves of it is lost.
The planner divides the layers among windowed groups, and chooses how many tokens a block holds, so that
a request needs as little memory as possible.

This module knows nothing of vLLM, so that capacity can be told before an engine starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from rtpurbo.config import HeadMap, RTPurboConfig
from rtpurbo.errors import RTPurboError

BLOCK_SIZES = (16, 32, 64, 128)
"""Tokens that a block may hold. All are multiples of 16, which keeps every part of a block aligned."""

MAX_WINDOWED_GROUPS = 8
"""Each group costs the scheduler a block table, and the runner its metadata, at every step."""

# Fewer groups are taken for so much more memory.
_WORTH_A_GROUP = 0.01


@dataclass(frozen=True)
class LayerHeads:
    """The heads of one layer on one rank, counted from the rank's first.

    Attributes:
        retrieval: query heads that retrieve.
        num_attention_heads: query heads of the rank.
        num_key_value_heads: KV heads of the rank.
    """

    retrieval: tuple[int, ...]
    num_attention_heads: int
    num_key_value_heads: int

    @property
    def num_full(self) -> int:
        """KV heads kept whole."""
        group = self.num_attention_heads // self.num_key_value_heads
        return len({head // group for head in self.retrieval})

    @property
    def num_windowed(self) -> int:
        """KV heads kept as sinks and window."""
        return self.num_key_value_heads - self.num_full


def heads_of_rank(head_map: HeadMap, rank: int = 0, world_size: int = 1) -> list[LayerHeads]:
    """What tensor parallelism gives a rank: of every layer, consecutive query and KV heads.

    Raises:
        RTPurboError: the heads cannot be divided so.
    """
    if head_map.num_key_value_heads % world_size or head_map.num_attention_heads % world_size:
        raise RTPurboError(
            f"{head_map.num_attention_heads} query heads and {head_map.num_key_value_heads} KV heads "
            f"cannot be divided among {world_size} ranks: choose a tensor parallel size that divides "
            "both."
        )
    share = head_map.num_attention_heads // world_size
    mine = range(rank * share, (rank + 1) * share)
    return [
        LayerHeads(
            tuple(head - mine.start for head in heads or () if head in mine),
            share,
            head_map.num_key_value_heads // world_size,
        )
        for heads in head_map.retrieval_heads
    ]


@dataclass(frozen=True)
class TokenBytes:
    """What a token of one head takes in the cache.

    Attributes:
        key_value: key and value of a KV head.
        index: index key of a retrieval head.
    """

    key_value: int
    index: int

    @classmethod
    def of(cls, config: RTPurboConfig, head_dim: int, bytes_per_element: int) -> TokenBytes:
        """For a model with so many bytes an element; index keys of bfloat16 models are float16."""
        index_bytes = 1 if config.attention.index_storage == "float8" else bytes_per_element
        return cls(2 * head_dim * bytes_per_element, config.indexer.index_dim * index_bytes)

    def full(self, heads: LayerHeads) -> int:
        """Of a layer, in the group that keeps every token."""
        return heads.num_full * self.key_value + len(heads.retrieval) * self.index

    def windowed(self, heads: LayerHeads) -> int:
        """Of a layer, in a group that keeps sinks and window."""
        return heads.num_windowed * self.key_value


@dataclass(frozen=True)
class Group:
    """Layers that share a block table.

    Attributes:
        layers: their numbers, ascending.
        block_size: tokens in a block.
        token_bytes: bytes of a token in all of these layers, on the rank that needs most.
    """

    layers: tuple[int, ...]
    block_size: int
    token_bytes: int

    @property
    def page_bytes(self) -> int:
        """What the group uses of a block."""
        return self.block_size * self.token_bytes

    def num_full_blocks(self, tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-tokens // self.block_size)

    def num_windowed_blocks(self, tokens: int, window: int, sinks: int, in_flight: int) -> int:
        """Blocks that a request of so many tokens holds at the most, where old ones are given back.

        Args:
            tokens: of the request.
            window: tokens of the sliding window.
            sinks: first tokens that are kept.
            in_flight: tokens that may be computed before blocks are given back.
        """
        kept = min(window - 1 + in_flight, tokens)
        # The window may begin anywhere in a block.
        blocks = self.num_full_blocks(kept) + 1 + self.num_full_blocks(sinks)
        return min(blocks, self.num_full_blocks(tokens))


@dataclass(frozen=True)
class CachePlan:
    """How the cache is divided.

    Attributes:
        full: the group of the full KV heads; None if no head retrieves.
        windowed: the groups of the others; none if every KV head is full.
        window: tokens of the sliding window.
        sinks: first tokens that are kept.
    """

    full: Group | None
    windowed: tuple[Group, ...]
    window: int
    sinks: int

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups, the full one first."""
        return (self.full, *self.windowed) if self.full else self.windowed

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: what the largest group needs."""
        return max(group.page_bytes for group in self.groups)

    def blocks_per_request(self, tokens: int, in_flight: int) -> int:
        """Blocks that a request of so many tokens holds at the most."""
        full = self.full.num_full_blocks(tokens) if self.full else 0
        limits = (self.window, self.sinks, in_flight)
        return full + sum(group.num_windowed_blocks(tokens, *limits) for group in self.windowed)

    def request_bytes(self, tokens: int, in_flight: int) -> int:
        """Bytes of these blocks."""
        return self.block_bytes * self.blocks_per_request(tokens, in_flight)

    def capacity(self, memory: int, tokens: int, in_flight: int) -> int:
        """Tokens that requests of a given length can hold together, as vLLM counts it.

        Args:
            memory: bytes for the cache, on one rank.
            tokens: length of a request.
            in_flight: vLLM's `max_num_batched_tokens`, times the batches that run at once (2 with
                asynchronous scheduling).
        """
        blocks = memory // self.block_bytes
        return int(blocks / self.blocks_per_request(tokens, in_flight) * tokens)


def plan_cache(
    config: RTPurboConfig,
    token_bytes: TokenBytes,
    *,
    tokens: int,
    in_flight: int,
    world_size: int = 1,
    lone_block_size: int = 16,
) -> CachePlan:
    """The plan under which a request of the given length takes the least memory.

    Args:
        config: head map and rule.
        token_bytes: what a token of a head takes.
        tokens: length of the requests to plan for: the model's longest.
        in_flight: as in `CachePlan.capacity`.
        world_size: ranks of tensor parallelism. They all use one plan, with room for the rank that
            needs most.
        lone_block_size: tokens of a block where there is but one group, which vLLM decides.

    Raises:
        RTPurboError: the heads cannot be divided among the ranks.
    """
    ranks = [heads_of_rank(config.head_map, rank, world_size) for rank in range(world_size)]
    window, sinks = config.attention.sliding_window, config.attention.num_sink_tokens
    full_layers = _layers_with_any(ranks, "num_full")
    windowed_layers = _layers_with_any(ranks, "num_windowed")
    best: CachePlan | None = None
    for bins in _partitions(ranks, token_bytes, windowed_layers):
        found: CachePlan | None = None
        num_groups = len(bins) + bool(full_layers)
        sizes: Sequence[int] = BLOCK_SIZES if num_groups > 1 else (lone_block_size,)
        for full_size, windowed_size in product(sizes, sizes):
            full = None
            if full_layers:
                largest = _largest(ranks, token_bytes.full, full_layers)
                full = Group(full_layers, full_size, largest)
            windowed = [
                Group(layers, windowed_size, _largest(ranks, token_bytes.windowed, layers))
                for layers in bins
            ]
            plan = CachePlan(full, tuple(windowed), window, sinks)
            if found is None or _cost(plan, tokens, in_flight) < _cost(found, tokens, in_flight):
                found = plan
        assert found is not None
        if best is None or _is_worth_it(found, best, tokens, in_flight):
            best = found
    assert best is not None
    return best


def dense_capacity(config: RTPurboConfig, token_bytes: TokenBytes, memory: int) -> int:
    """Tokens that the dense model's cache holds in the same memory of one device."""
    head_map = config.head_map
    layers = len(head_map.retrieval_heads)
    return memory // (layers * head_map.num_key_value_heads * token_bytes.key_value)


def _layers_with_any(ranks: list[list[LayerHeads]], kind: str) -> tuple[int, ...]:
    layers = range(len(ranks[0]))
    return tuple(layer for layer in layers if any(getattr(rank[layer], kind) for rank in ranks))


def _largest(ranks: list[list[LayerHeads]], token_bytes: Any, layers: Sequence[int]) -> int:
    """Bytes of a token in these layers, on the rank that needs most."""
    return max(sum(token_bytes(rank[layer]) for layer in layers) for rank in ranks)


def _partitions(
    ranks: list[list[LayerHeads]], token_bytes: TokenBytes, layers: Sequence[int]
) -> Iterator[list[tuple[int, ...]]]:
    """Ways to divide layers into windowed groups of nearly equal size, one for each number of groups."""
    if not layers:
        yield []
        return
    size = {layer: _largest(ranks, token_bytes.windowed, [layer]) for layer in layers}
    heaviest_first = sorted(layers, key=lambda layer: -size[layer])
    for count in range(1, min(MAX_WINDOWED_GROUPS, len(layers)) + 1):
        bins: list[list[int]] = [[] for _ in range(count)]
        for layer in heaviest_first:
            min(bins, key=lambda chosen: sum(size[other] for other in chosen)).append(layer)
        yield [tuple(sorted(chosen)) for chosen in bins]


def _cost(plan: CachePlan, tokens: int, in_flight: int) -> tuple[int, int]:
    # Where memory is equal, small blocks let more prompts share their beginnings.
    return plan.request_bytes(tokens, in_flight), sum(group.block_size for group in plan.groups)


def _is_worth_it(plan: CachePlan, simpler: CachePlan, tokens: int, in_flight: int) -> bool:
    """Whether more groups save enough."""
    saved = 1 - plan.request_bytes(tokens, in_flight) / simpler.request_bytes(tokens, in_flight)
    return saved > _WORTH_A_GROUP

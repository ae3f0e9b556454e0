"""Layout of a sparse model's KV cache in vLLM's blocks, and its capacity in tokens.

vLLM has one pool of blocks of equal size. A *group* is a set of layers that share a block table: one group holds the
full KV heads of all layers with their index keys and keeps every token, the *windowed* groups hold the other KV
heads and keep sinks and window. A block belongs to one group at a time, so the largest group determines the size of
a block, and smaller groups leave a part of it unused. The planner divides the layers among windowed groups and
chooses the tokens per block so that a request needs as little memory as possible.

This module does not import vLLM, so that the capacity can be computed without an engine.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from rtpurbo.config import AttentionRule, HeadMap, RTPurboConfig
from rtpurbo.ops.eager.heavy_hitters import OBSERVED_QUERIES
from rtpurbo.serving.vllm.rank_heads import LayerHeads, TokenBytes, heads_of_rank

BLOCK_SIZES = (16, 32, 64, 128)
"""Supported tokens per block: multiples of 16, which keep every part of a block aligned."""

MAX_WINDOWED_GROUPS = 8
"""Upper limit of the groups: each costs the scheduler a block table and the runner metadata in every step."""

# Share of memory that another group must save.
_MIN_SAVING_PER_GROUP = 0.01


def heavy_hitter_blocks(num_sinks: int, num_heavy_hitters: int, block_size: int) -> range:
    """Numbers of the blocks with the sinks that heavy hitters replace; each request has its own copy of them."""
    if not num_heavy_hitters:
        return range(0)
    return range((num_sinks - num_heavy_hitters) // block_size, -(-num_sinks // block_size))


def smallest_window(rule: AttentionRule, block_size: int) -> int:
    """Smallest sliding window with which the blocks above are complete when heavy hitters are chosen.

    That may be before the last queries of a prompt (see `Batch.observed_queries`), and the last of these blocks
    may hold tokens after the sinks.
    """
    return OBSERVED_QUERIES + -rule.num_sink_tokens % block_size


@dataclass(frozen=True)
class Group:
    """Layers that share a block table.

    Attributes:
        layers: indices of the layers, ascending.
        block_size: tokens per block.
        token_bytes: bytes of a token in all of these layers, on the rank that needs most.
        window: tokens of the sliding window that the layers have in the dense model too, without sinks; None for
            converted layers.
    """

    layers: tuple[int, ...]
    block_size: int
    token_bytes: int
    window: int | None = None

    @property
    def page_bytes(self) -> int:
        """Bytes that the group uses of a block."""
        return self.block_size * self.token_bytes

    def num_full_blocks(self, tokens: int) -> int:
        """Blocks for `tokens` tokens."""
        return -(-tokens // self.block_size)

    def num_windowed_blocks(self, tokens: int, window: int, sinks: int, in_flight: int) -> int:
        """Largest number of blocks of a request, whose blocks before the window are freed.

        Args:
            tokens: tokens of the request.
            window: tokens of the sliding window.
            sinks: first tokens that are kept.
            in_flight: tokens that may be computed before blocks are freed.
        """
        kept = min(window - 1 + in_flight, tokens)
        # The window may begin at any token of a block.
        blocks = self.num_full_blocks(kept) + 1 + self.num_full_blocks(sinks)
        return min(blocks, self.num_full_blocks(tokens))


@dataclass(frozen=True)
class CachePlan:
    """Division of the cache into groups.

    Attributes:
        full: group of the full KV heads; None without retrieval heads.
        windowed: groups of the other KV heads; empty if every KV head is full.
        window: tokens of the sliding window of converted layers.
        sinks: first tokens that converted layers keep.
        keeps_prompts: windowed groups of converted layers keep every token until the prompt of a request has been
            read, for its dense queries.
        num_heavy_hitters: number of the last sinks that heavy hitters replace.
    """

    full: Group | None
    windowed: tuple[Group, ...]
    window: int
    sinks: int
    keeps_prompts: bool = False
    num_heavy_hitters: int = 0

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups, the full one first."""
        return (self.full, *self.windowed) if self.full else self.windowed

    @property
    def block_bytes(self) -> int:
        """Bytes of a block, those of the largest group."""
        return max(group.page_bytes for group in self.groups)

    def num_windowed_blocks(self, group: Group, tokens: int, in_flight: int) -> int:
        """Largest number of blocks of a request with `tokens` tokens in a windowed group."""
        window, sinks, keeps_prompts = self.retention(group)
        if keeps_prompts:
            return group.num_full_blocks(tokens)
        return group.num_windowed_blocks(tokens, window, sinks, in_flight)

    def heavy_hitter_blocks(self, group: Group) -> range:
        """Numbers of the blocks of a windowed group of which each request has its own copy."""
        if group.window is not None:
            return range(0)
        return heavy_hitter_blocks(self.sinks, self.num_heavy_hitters, group.block_size)

    @property
    def num_own_blocks(self) -> int:
        """Blocks of a request that are its own copies."""
        return sum(len(self.heavy_hitter_blocks(group)) for group in self.windowed)

    def retention(self, group: Group) -> tuple[int, int, bool]:
        """Window, sinks, and whether prompts are kept until they have been read, of a windowed group."""
        if group.window is not None:
            return group.window, 0, False
        return self.window, self.sinks, self.keeps_prompts

    def blocks_per_request(self, tokens: int, in_flight: int) -> int:
        """Largest number of blocks of a request with `tokens` tokens."""
        full = self.full.num_full_blocks(tokens) if self.full else 0
        windowed = sum(
            self.num_windowed_blocks(group, tokens, in_flight) for group in self.windowed
        )
        return full + windowed + self.num_own_blocks

    def blocks_after_prompt(self, tokens: int, in_flight: int) -> int:
        """Largest number of blocks of a request with `tokens` tokens whose prompt has been read."""
        return replace(self, keeps_prompts=False).blocks_per_request(tokens, in_flight)

    def request_bytes(self, tokens: int, in_flight: int) -> int:
        """Largest number of bytes of a request with `tokens` tokens whose prompt has been read."""
        return self.block_bytes * self.blocks_after_prompt(tokens, in_flight)

    def capacity(self, memory: int, tokens: int, in_flight: int) -> int:
        """Tokens of all requests of a given length that fit into memory while one of them reads its prompt.

        Without `keeps_prompts`, this is the size that vLLM reports. With it, vLLM reports what fits if all requests
        read their prompts at once, but its scheduler completes a prompt before it begins the next one.

        Args:
            memory: bytes for the cache, on one rank.
            tokens: length of a request.
            in_flight: vLLM's `max_num_batched_tokens`, times the number of concurrent batches (2 with
                asynchronous scheduling).
        """
        blocks = memory // self.block_bytes
        largest = self.blocks_per_request(tokens, in_flight)
        if not self.keeps_prompts or blocks < largest:
            return int(blocks / largest * tokens)
        others = (blocks - largest) / self.blocks_after_prompt(tokens, in_flight)
        return int((1 + others) * tokens)


def plan_cache(
    config: RTPurboConfig,
    token_bytes: TokenBytes,
    *,
    tokens: int,
    in_flight: int,
    world_size: int = 1,
    lone_block_size: int = 16,
    own_window: int | None = None,
) -> CachePlan:
    """Plan under which a request of the given length needs the least memory.

    Args:
        config: head map and attention rule.
        token_bytes: bytes of a token of a head.
        tokens: length of the requests to plan for, the longest supported one.
        in_flight: as in `CachePlan.capacity`.
        world_size: ranks of tensor parallelism. All use one plan, with room for the rank that needs
            most.
        lone_block_size: tokens per block if there is only one group; set by vLLM.
        own_window: tokens of the sliding window of layers that are not converted.

    Raises:
        RTPurboError: the number of heads is not divisible by `world_size`.
    """
    ranks = [heads_of_rank(config.head_map, rank, world_size) for rank in range(world_size)]
    rule = config.attention
    without_groups = CachePlan(
        None,
        (),
        rule.sliding_window,
        rule.num_sink_tokens,
        rule.has_dense_queries,
        rule.num_heavy_hitters,
    )
    full_layers = _layers_with_any(ranks, "num_full")
    windowed_layers = _layers_with_any(ranks, "num_windowed")
    converted = set(config.head_map.converted_layers)
    own_layers = [layer for layer in windowed_layers if layer not in converted]
    windowed_layers = tuple(layer for layer in windowed_layers if layer in converted)
    assert own_window is not None or not own_layers
    best: CachePlan | None = None
    for bins, own_bins in product(
        _partitions(ranks, token_bytes, windowed_layers),
        _partitions(ranks, token_bytes, own_layers),
    ):
        num_groups = len(bins) + len(own_bins) + bool(full_layers)
        has_own_blocks = bool(bins and rule.num_heavy_hitters)
        if len(bins) + len(own_bins) > MAX_WINDOWED_GROUPS:
            continue
        found: CachePlan | None = None
        sizes: Sequence[int] = BLOCK_SIZES
        if num_groups + has_own_blocks == 1:
            sizes = (lone_block_size,)
        for full_size, windowed_size in product(sizes, sizes):
            if has_own_blocks and rule.sliding_window < smallest_window(rule, windowed_size):
                continue
            full = None
            if full_layers:
                largest = _largest(ranks, token_bytes.full, full_layers)
                full = Group(full_layers, full_size, largest)
            windowed = [
                Group(
                    layers, windowed_size, _largest(ranks, token_bytes.windowed, layers), window_of
                )
                for window_of, chosen in ((None, bins), (own_window, own_bins))
                for layers in chosen
            ]
            plan = replace(without_groups, full=full, windowed=tuple(windowed))
            if found is None or _cost(plan, tokens, in_flight) < _cost(found, tokens, in_flight):
                found = plan
        assert found is not None
        if best is None or _saves_enough(found, best, tokens, in_flight):
            best = found
    assert best is not None
    return best


def dense_capacity(
    config: RTPurboConfig,
    token_bytes: TokenBytes,
    memory: int,
    *,
    tokens: int,
    in_flight: int,
    own_window: int | None = None,
) -> int:
    """Tokens of the dense model's cache in the same memory of one device.

    Args:
        config: head map.
        token_bytes: bytes of a token of a head.
        memory: bytes for the cache.
        tokens: as in `plan_cache`.
        in_flight: as in `CachePlan.capacity`.
        own_window: as in `plan_cache`; such layers of the dense model have windowed caches too.
    """
    head_map = config.head_map
    num_layers = len(head_map.retrieval_heads)
    if len(head_map.converted_layers) == num_layers:
        kv_heads = sum(map(head_map.num_kv_heads, range(num_layers)))
        return memory // (kv_heads * token_bytes.key_value)
    heads = range(head_map.num_query_heads(0))
    layers = [heads is not None for heads in head_map.retrieval_heads]
    everything = HeadMap.uniform(heads, layers, len(heads), head_map.num_kv_heads(0))
    plan = plan_cache(
        replace(config, head_map=everything),
        replace(token_bytes, index=0),
        tokens=tokens,
        in_flight=in_flight,
        own_window=own_window,
    )
    return replace(plan, keeps_prompts=False).capacity(memory, tokens, in_flight)


def _layers_with_any(ranks: list[list[LayerHeads]], kind: str) -> tuple[int, ...]:
    layers = range(len(ranks[0]))
    return tuple(layer for layer in layers if any(getattr(rank[layer], kind) for rank in ranks))


def _largest(ranks: list[list[LayerHeads]], token_bytes: Any, layers: Sequence[int]) -> int:
    """Bytes of a token in these layers, on the rank that needs most."""
    return max(sum(token_bytes(rank[layer]) for layer in layers) for rank in ranks)


def _partitions(
    ranks: list[list[LayerHeads]], token_bytes: TokenBytes, layers: Sequence[int]
) -> Iterator[list[tuple[int, ...]]]:
    """Divisions of the layers into windowed groups of nearly equal size, one per number of groups."""
    if not layers:
        yield []
        return
    size = {layer: _largest(ranks, token_bytes.windowed, [layer]) for layer in layers}
    largest_first = sorted(layers, key=lambda layer: -size[layer])
    for count in range(1, min(MAX_WINDOWED_GROUPS, len(layers)) + 1):
        bins: list[list[int]] = [[] for _ in range(count)]
        for layer in largest_first:
            min(bins, key=lambda chosen: sum(size[other] for other in chosen)).append(layer)
        yield [tuple(sorted(chosen)) for chosen in bins]


def _cost(plan: CachePlan, tokens: int, in_flight: int) -> tuple[int, int]:
    # With equal memory, small blocks let more requests share a cached prefix.
    return plan.request_bytes(tokens, in_flight), sum(group.block_size for group in plan.groups)


def _saves_enough(plan: CachePlan, simpler: CachePlan, tokens: int, in_flight: int) -> bool:
    """Returns True if the plan with more groups saves enough memory."""
    saved = 1 - plan.request_bytes(tokens, in_flight) / simpler.request_bytes(tokens, in_flight)
    return saved > _MIN_SAVING_PER_GROUP

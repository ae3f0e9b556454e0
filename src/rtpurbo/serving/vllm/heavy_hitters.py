"""Heavy hitters of prompts in pages: chosen when a prompt ends, read by the queries after it.

Blocks with sinks are shared by requests with the same prefix. Each request therefore has its own copies of those in
which heavy hitters replace sinks, and the block table of the queries after its prompt names these instead. For letters
see `pages`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout, KeyValueStates
from rtpurbo.ops.eager.heavy_hitters import heavy_hitters, shortest_prompt
from rtpurbo.serving.vllm.layout import heavy_hitter_blocks
from rtpurbo.serving.vllm.pages import NULL_BLOCK, LayerCache


def choose_heavy_hitters(
    queries: Tensor, cache: LayerCache, layout: HeadLayout, rule: AttentionRule, scaling: float
) -> None:
    """Writes the own blocks of the requests whose prompts end in a step, without waiting for a GPU.

    Args:
        queries: [T, H, D], after RoPE.
        cache: windowed KV heads of a layer, to which the step's tokens have been appended.
        layout: query heads by kind.
        rule: windows and number of heavy hitters.
        scaling: factor on the dot products with stored keys.
    """
    batch, pages, heads = cache.batch, cache.pages, layout.local_windowed.heads
    first, counts = batch.observed_queries(rule)
    starts = batch.starts[:-1] + first - batch.lengths + batch.num_queries
    for request in counts.nonzero()[:, 0].tolist():
        start, begin = int(starts[request]), int(first[request])
        end = begin + int(counts[request])
        table = batch.block_table[request, : -(-end // pages.block_size)].long()
        positions = torch.arange(len(table) * pages.block_size, device=table.device)
        # A reused prefix may lack blocks.
        held = (table != NULL_BLOCK).repeat_interleave(pages.block_size)
        keys = pages.keys[table].transpose(0, 1).flatten(1, 2)[:, :end].to(queries.dtype)[None]
        chosen = heavy_hitters(
            queries[start : start + end - begin, heads].transpose(0, 1)[None],
            positions[None, begin:end],
            KeyValueStates(keys, keys, positions.where(held, -1)[None, :end]),
            rule,
            scaling=scaling,
            num_tokens=int(batch.prompt_lengths[request]),
        )
        _store(cache, request, table, chosen[0], rule)


def _store(
    cache: LayerCache, request: int, table: Tensor, chosen: Tensor, rule: AttentionRule
) -> None:
    """Copies the sinks of a request to its own blocks, and the tokens at positions `chosen` [heads, K] over some."""
    assert cache.own_blocks is not None
    size = cache.pages.block_size
    blocks = _replaced(cache, rule)
    source = torch.arange(blocks.start * size, blocks.stop * size, device=table.device)
    source = source.repeat(len(chosen), 1)
    place = rule.num_fixed_sinks - blocks.start * size
    source[:, place : place + rule.num_heavy_hitters] = chosen
    heads = torch.arange(len(chosen), device=table.device)[:, None]
    for part in (cache.pages.keys, cache.pages.values):
        # Not every operation exists for float8.
        raw = part.view(torch.uint8)
        copied = raw[table[source // size], heads, source % size]
        raw[cache.own_blocks[request].long()] = copied.unflatten(1, (-1, size)).transpose(0, 1)


def decode_table(cache: LayerCache, rule: AttentionRule) -> Tensor:
    """Block table of a uniform step, [R, blocks], from device tensors alone.

    The first layer computes it for the others in every step, also in a CUDA graph.
    """
    batch = cache.batch
    if cache.own_blocks is None:
        return batch.block_table
    if cache.is_first or batch.decode_table is None:
        prompts, lengths = batch.device_prompt_lengths, batch.device_lengths
        assert prompts is not None
        follows = (lengths > prompts) & (prompts >= shortest_prompt(rule))
        batch.decode_table = with_own_blocks(
            cache, batch.block_table, cache.own_blocks, follows, rule
        )
    return batch.decode_table


def with_own_blocks(
    cache: LayerCache, table: Tensor, own_blocks: Tensor, follows: Tensor, rule: AttentionRule
) -> Tensor:
    """Block table in which a request's own blocks replace those that it shares.

    Args:
        cache: windowed KV heads of a layer.
        table: int32 [N, blocks].
        own_blocks: int32 [N, own blocks], of the same requests.
        follows: bool [N], True for queries after a prompt with heavy hitters.
        rule: windows and number of heavy hitters.
    """
    blocks = _replaced(cache, rule)
    shared = table[:, blocks.start : blocks.stop]
    # Tables are narrower than the sinks if no request is that long.
    own = own_blocks[:, : shared.shape[1]].where(follows[:, None], shared)
    return torch.cat([table[:, : blocks.start], own, table[:, blocks.stop :]], 1)


def _replaced(cache: LayerCache, rule: AttentionRule) -> range:
    """Numbers of the blocks of which a request has its own copies."""
    return heavy_hitter_blocks(rule.num_sink_tokens, rule.num_heavy_hitters, cache.pages.block_size)

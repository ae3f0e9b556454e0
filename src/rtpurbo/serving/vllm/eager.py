"""Attention over pages, one request after another, by the readable operators.

It serves CPUs, and it is what the kernels of `cuda` are compared with. R requests, T rows, H query
heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout, KeyValueStates, headwise_attention
from rtpurbo.serving.vllm.pages import LayerCache, no_states


def attend(
    queries: Tensor,
    index_queries: Tensor | None,
    full: LayerCache | None,
    windowed: LayerCache | None,
    layout: HeadLayout,
    rule: AttentionRule,
    scaling: float,
    output: Tensor,
) -> None:
    """Writes the attention of a step's rows, whose tokens are in the pages already.

    Args:
        queries: [T, H, D], after RoPE.
        index_queries: [retrieval heads, T, index_dim]; None if no row selects.
        full: the layer's full KV heads; None if it has none.
        windowed: its other KV heads; None if it has none.
        layout: which head does what.
        rule: windows and selection.
        scaling: factor on the dot products.
        output: [T, H, D], written where a request has rows.
    """
    held = full or windowed
    assert held is not None
    for request, start, end, length in held.batch.requests():
        selecting = held.batch.num_selecting_rows(request, rule)
        positions = torch.arange(length - (end - start), length, device=queries.device)
        attended, _ = headwise_attention(
            queries[None, start:end].transpose(1, 2),
            positions[None],
            _full_states(full, request, length, queries),
            _windowed_states(windowed, request, length, end - start, rule, queries),
            layout,
            index_queries[None, :, end - selecting : end]
            if index_queries is not None and selecting
            else None,
            rule,
            scaling=scaling,
            backend="eager",
        )
        output[start:end] = attended[0].transpose(0, 1)


def _full_states(
    cache: LayerCache | None, request: int, length: int, like: Tensor
) -> KeyValueStates:
    """Every token of a request."""
    if cache is None:
        return no_states(like, 1)
    pages = cache.pages
    table = cache.batch.block_table[request, : -(-length // pages.block_size)]
    keys, values, index_keys = (
        None if part is None else _gathered(part, table)[:, :, :length]
        for part in (pages.keys, pages.values, pages.index_keys)
    )
    assert keys is not None
    assert values is not None
    positions = torch.arange(length, device=like.device)[None]
    return KeyValueStates(keys, values, positions, index_keys, in_order=True)


def _windowed_states(
    cache: LayerCache | None,
    request: int,
    length: int,
    rows: int,
    rule: AttentionRule,
    like: Tensor,
) -> KeyValueStates:
    """The blocks of a request that hold sinks, and windows of its last rows."""
    if cache is None:
        return no_states(like, 1)
    pages, size = cache.pages, cache.pages.block_size
    sinks = -(-rule.num_sink_tokens // size)
    window = max(0, length - rows - rule.sliding_window + 1) // size
    numbers = torch.arange(-(-length // size), device=like.device)
    if window > sinks:
        numbers = torch.cat([numbers[:sinks], numbers[window:]])
    table = cache.batch.block_table[request, numbers]
    positions = (numbers[:, None] * size + torch.arange(size, device=like.device)).flatten()
    # Only the last block may hold more than there is.
    positions = positions[: positions.numel() - (-length % size)]
    keys, values = (
        _gathered(part, table)[:, :, : positions.numel()] for part in (pages.keys, pages.values)
    )
    return KeyValueStates(keys, values, positions[None], in_order=window <= sinks)


def _gathered(part: Tensor, table: Tensor) -> Tensor:
    """[1, heads, blocks * block_size, dimensions] of pages [num_blocks, heads, block_size, dimensions]."""
    return part[table.long()].transpose(0, 1).flatten(1, 2)[None]

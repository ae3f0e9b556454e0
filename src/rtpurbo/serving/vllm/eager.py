"""Attention over pages, one request after another, by the readable operators.

It serves CPUs, and it is what the kernels of `cuda` are compared with. R requests, T rows, H query
heads, D head_dim.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout, KeyValueStates, headwise_attention
from rtpurbo.serving.vllm.pages import Batch, LayerCache


def attend(
    queries: Tensor,
    index_queries: Tensor | None,
    full: LayerCache | None,
    bounded: LayerCache | None,
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
        bounded: its other KV heads; None if it has none.
        layout: which head does what.
        rule: windows and selection.
        scaling: factor on the dot products.
        output: [T, H, D], written where a request has rows.
    """
    held = full or bounded
    assert held is not None
    for request, (start, end) in enumerate(pairwise(held.batch.starts)):
        length = held.batch.lengths[request]
        if start == end or length < end - start:
            continue  # padding
        selecting = num_selecting_rows(held.batch, request, rule)
        positions = torch.arange(length - (end - start), length, device=queries.device)
        attended, _ = headwise_attention(
            queries[None, start:end].transpose(1, 2),
            positions[None],
            _full_states(full, request, length, queries),
            _bounded_states(bounded, request, length, end - start, rule, queries),
            layout,
            index_queries[None, :, end - selecting : end]
            if index_queries is not None and selecting
            else None,
            rule,
            scaling=scaling,
            backend="eager",
        )
        output[start:end] = attended[0].transpose(0, 1)


def num_selecting_rows(batch: Batch, request: int, rule: AttentionRule) -> int:
    """How many of a request's last rows select.

    What was generated selects, whether it is computed for the first time or again after the request
    had to give its blocks back; the prompt is dense under `prefill_mode` dense, in whatever chunks
    it comes.
    """
    rows = batch.starts[request + 1] - batch.starts[request]
    if rule.prefill_mode != "dense":
        return rows
    return max(0, min(rows, batch.lengths[request] - batch.prompt_lengths[request]))


def _full_states(
    cache: LayerCache | None, request: int, length: int, like: Tensor
) -> KeyValueStates:
    """Every token of a request."""
    if cache is None:
        return _nothing(like)
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


def _bounded_states(
    cache: LayerCache | None,
    request: int,
    length: int,
    rows: int,
    rule: AttentionRule,
    like: Tensor,
) -> KeyValueStates:
    """The blocks of a request that hold sinks, and windows of its last rows."""
    if cache is None:
        return _nothing(like)
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


def _nothing(like: Tensor) -> KeyValueStates:
    """States without heads."""
    empty = like.new_empty(1, 0, 0, like.shape[-1])
    return KeyValueStates(empty, empty, torch.empty(1, 0, dtype=torch.int64, device=like.device))

"""Attention over pages with the eager operators, request by request.

Used on CPUs, and as the reference for `cuda` in tests. R requests, T queries, H query heads, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout, KeyValueStates, headwise_attention
from rtpurbo.ops.eager.heavy_hitters import shortest_prompt
from rtpurbo.serving.vllm.heavy_hitters import with_own_blocks
from rtpurbo.serving.vllm.pages import NULL_BLOCK, LayerCache, no_states


def attend(
    queries: Tensor,
    index_queries: Tensor | None,
    full: LayerCache | None,
    windowed: LayerCache | None,
    layout: HeadLayout,
    rule: AttentionRule,
    scaling: float,
    output: Tensor,
    sinks: Tensor | None = None,
) -> None:
    """Writes the attention output of a step, whose tokens are already in the pages.

    Args:
        queries: [T, H, D], after RoPE.
        index_queries: [T, retrieval heads, index_dim]; None without retrieval heads.
        full: full KV heads of the layer; None if it has none.
        windowed: windowed KV heads of the layer; None if it has none.
        layout: query heads by kind.
        rule: windows and selection.
        scaling: factor on the dot products with stored keys.
        output: [T, H, D], sums of stored values, written for the queries of all requests.
        sinks: learned sinks [H]; None if the model has none.
    """
    cache = full or windowed
    assert cache is not None
    batch = cache.batch
    first_dense, num_dense = batch.dense_queries(rule)
    for request, (start, length, num_queries, prompt, selecting, first, dense) in enumerate(
        zip(
            batch.starts.tolist()[:-1],
            batch.lengths.tolist(),
            batch.num_queries.tolist(),
            batch.prompt_lengths.tolist(),
            batch.num_selecting(rule).tolist(),
            first_dense.tolist(),
            num_dense.tolist(),
            strict=True,
        )
    ):
        computed = length - num_queries
        table = None if windowed is None else windowed.batch.block_table[request]
        parts = [(computed, length, table)]
        if windowed is not None and windowed.own_blocks is not None:
            # Queries after the prompt read heavy hitters.
            end = min(max(computed, prompt), length)
            after = _table_after_prompt(windowed, request, prompt, rule)
            parts = [(computed, end, table), (end, length, after)]
        for begin, end, table in parts:
            if begin == end:
                continue
            rows = slice(start + begin - computed, start + end - computed)
            num_selecting = min(end - begin, max(0, selecting - (length - end)))
            is_dense = dense > 0 and begin <= first < end
            attended, _ = headwise_attention(
                queries[None, rows].transpose(1, 2),
                torch.arange(begin, end, device=queries.device)[None],
                _full_states(full, request, end, queries),
                _windowed_states(windowed, table, end, None if is_dense else begin, rule, queries),
                layout,
                index_queries[None, rows][:, -num_selecting:].transpose(1, 2)
                if index_queries is not None and num_selecting
                else None,
                rule,
                scaling=scaling,
                sinks=sinks,
                dense_queries=slice(first - begin, first - begin + dense) if is_dense else None,
                backend="eager",
            )
            output[rows] = attended[0].transpose(0, 1)


def _table_after_prompt(
    windowed: LayerCache, request: int, prompt: int, rule: AttentionRule
) -> Tensor:
    """Block table of the queries after a prompt, int32 [blocks]."""
    assert windowed.own_blocks is not None
    table, own_blocks = windowed.batch.block_table[request], windowed.own_blocks[request]
    follows = torch.tensor([prompt >= shortest_prompt(rule)], device=table.device)
    return with_own_blocks(windowed, table[None], own_blocks[None], follows, rule)[0]


def _full_states(
    cache: LayerCache | None, request: int, length: int, like: Tensor
) -> KeyValueStates:
    """States of all tokens of a request."""
    if cache is None:
        return no_states(like, 1)
    pages = cache.pages
    table = cache.batch.block_table[request, : -(-length // pages.block_size)]
    keys, values = (
        _gathered(part, table)[:, :, :length].to(like.dtype) for part in (pages.keys, pages.values)
    )
    index_keys = None
    if pages.index_keys is not None:
        index_keys = _gathered(pages.index_keys, table)[:, :, :length]
    positions = torch.arange(length, device=like.device)[None]
    return KeyValueStates(keys, values, positions, index_keys, in_order=True)


def _windowed_states(
    cache: LayerCache | None,
    block_table: Tensor | None,
    length: int,
    computed: int | None,
    rule: AttentionRule,
    like: Tensor,
) -> KeyValueStates:
    """States of the blocks with the sinks and the windows of the queries from position `computed` on.

    If `computed` is None, those of all blocks that the request has.
    """
    if cache is None or block_table is None:
        return no_states(like, 1)
    pages, size = cache.pages, cache.pages.block_size
    sinks = -(-rule.num_sink_tokens // size)
    numbers = torch.arange(-(-length // size), device=like.device)
    if computed is not None:
        window = max(0, computed - rule.sliding_window + 1) // size
        if window > sinks:
            numbers = torch.cat([numbers[:sinks], numbers[window:]])
    else:
        numbers = numbers[block_table[: len(numbers)] != NULL_BLOCK]
    table = block_table[numbers]
    positions = (numbers[:, None] * size + torch.arange(size, device=like.device)).flatten()
    # Only the last block may be partly unused.
    positions = positions[: positions.numel() - (-length % size)]
    keys, values = (
        _gathered(part, table)[:, :, : positions.numel()].to(like.dtype)
        for part in (pages.keys, pages.values)
    )
    in_order = len(numbers) * size >= length
    return KeyValueStates(keys, values, positions[None], in_order=in_order)


def _gathered(part: Tensor, table: Tensor) -> Tensor:
    """States [1, heads, blocks * block_size, dimensions] of pages [num_blocks, heads, block_size, dimensions]."""
    return part[table.long()].transpose(0, 1).flatten(1, 2)[None]

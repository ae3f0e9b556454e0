"""Visibility masks from positions, and chunks of queries that limit memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Limit on the scores of one chunk of queries, in elements.
MAX_CHUNK_ELEMENTS = 2**26


def causal_mask(query_positions: Tensor, key_positions: Tensor) -> Tensor:
    """Mask of the keys at or before each query, without padding: bool [batch, 1, q_len, k_len]."""
    keys = key_positions[:, None, None, :]
    return (keys >= 0) & (keys <= query_positions[:, None, :, None])


def near_mask(
    query_positions: Tensor,
    key_positions: Tensor,
    sliding_window: int | Tensor,
    num_sink_tokens: int,
) -> Tensor:
    """Mask of sinks and window: bool [batch, 1 or heads, q_len, k_len].

    Args:
        query_positions: int64 [batch, q_len].
        key_positions: int64 [batch, k_len], -1 for empty slots.
        sliding_window: W keys including the query's own, or int64 [heads] for a window per head.
        num_sink_tokens: S, keys at positions 0 to S - 1.
    """
    if isinstance(sliding_window, Tensor):
        sliding_window = sliding_window[None, :, None, None]
    keys = key_positions[:, None, None, :]
    queries = query_positions[:, None, :, None]
    return causal_mask(query_positions, key_positions) & (
        (keys > queries - sliding_window) | (keys < num_sink_tokens)
    )


def keys_in_reach(
    query_positions: Tensor, key_positions: Tensor, sliding_window: int, num_sink_tokens: int
) -> Tensor | None:
    """Indices of the keys within sinks or window of any query; None for all keys."""
    num_keys = key_positions.shape[1]
    # Not profitable (it synchronises with a GPU) if nearly all keys would remain.
    if num_keys <= 2 * (sliding_window + num_sink_tokens + query_positions.shape[1]):
        return None
    real = query_positions >= 0
    first = query_positions.masked_fill(~real, torch.iinfo(torch.int64).max).amin(1, keepdim=True)
    last = query_positions.amax(1, keepdim=True)
    window = (key_positions > first - sliding_window) & (key_positions <= last)
    sinks = key_positions < num_sink_tokens
    return ((window | sinks) & (key_positions >= 0)).any(0).nonzero()[:, 0]


def query_chunks(num_queries: int, elements_per_query: int, multiple: int = 1) -> Iterator[slice]:
    """Slices of queries whose scores fit `MAX_CHUNK_ELEMENTS`: multiples of `multiple`, except the last."""
    size = max(1, MAX_CHUNK_ELEMENTS // max(1, elements_per_query))
    size = max(multiple, size // multiple * multiple)
    for start in range(0, num_queries, size):
        yield slice(start, min(start + size, num_queries))

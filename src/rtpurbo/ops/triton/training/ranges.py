"""Tile ranges of the loss of stage 1: tiles of each program, and tiles that need no mask.

A key n *counts* for the gradient of query m, whose document begins at d, if d + margin <= n <= m - lag. Margin
and lag are sinks and window, or 0 if the indexer estimates every key (reading `paper`). All are indices in the
packed sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def query_block_ranges(
    query_indices: Tensor, starts: Tensor, margin: int, lag: int, num_queries: int, num_keys: int
) -> Tensor:
    """Key ranges of each query block.

    Args:
        query_indices: int64 [queries], ascending.
        starts: int64 [queries], index of the first token of each query's document.
        margin: first keys of a document, which do not count.
        lag: recent keys, which do not count.
        num_queries: queries of a block.
        num_keys: keys of a tile.

    Returns:
        int32 [tiles, 6], ascending indices begin, a, b, c, d, end, all but the last multiples of `num_keys`.
        Every key from a to b counts for every query; every key from c to d is visible to every query but does
        not count. Keys from begin to a, b to c and d to end need a mask.
    """
    first, last = _ends(query_indices, num_queries)
    earliest, latest = _ends(starts, num_queries)
    begin = earliest // num_keys * num_keys
    end = last + 1
    near_to = ((first + 1) // num_keys * num_keys).clamp(begin, end)
    near_from = torch.maximum(last - lag + 1, latest)
    near_from = _rounded_up(near_from, num_keys).clamp(begin, near_to)
    far_to = ((first - lag + 1) // num_keys * num_keys).clamp(begin, near_from)
    far_from = _rounded_up(latest + margin, num_keys).clamp(begin, far_to)
    return torch.stack([begin, far_from, far_to, near_from, near_to, end], 1).to(torch.int32)


def key_block_ranges(
    query_indices: Tensor,
    starts: Tensor,
    length: int,
    margin: int,
    lag: int,
    num_queries: int,
    num_keys: int,
) -> Tensor:
    """Query ranges of each tile of keys; arguments as in `query_block_ranges`, of `length` keys.

    Returns:
        int32 [tiles, 4], ascending positions first, a, b, end in `query_indices`. Every key of the tile counts for
        every query from a to b, a multiple of `num_queries`; no other key counts outside first to end.
    """
    begin = torch.arange(0, length, num_keys, device=query_indices.device)
    final = (begin + num_keys).clamp(max=length) - 1
    first = torch.searchsorted(query_indices, begin + lag)
    end = torch.maximum(torch.searchsorted(starts, final - margin, right=True), first)
    whole_from = first + _rounded_up(
        torch.searchsorted(query_indices, final + lag) - first, num_queries
    )
    whole_from = torch.minimum(whole_from, end)
    whole_to = torch.searchsorted(starts, begin - margin, right=True).minimum(end)
    whole_to = whole_from + (whole_to - whole_from).clamp(min=0) // num_queries * num_queries
    return torch.stack([first, whole_from, whole_to, end], 1).to(torch.int32)


def _ends(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and last value of each block of `size` values."""
    first = torch.arange(0, values.numel(), size, device=values.device)
    return values[first], values[(first + size - 1).clamp(max=values.numel() - 1)]


def _rounded_up(values: Tensor, multiple: int) -> Tensor:
    return -(-values // multiple) * multiple

"""Which tiles a program of the loss walks over, and which of them need no mask: worked out beforehand.

A row at place m of a document that begins at place d *counts* a key n for its gradient if
d + margin <= n <= m - lag, where margin and lag are sinks and window, or 0 where the indexer
estimates every key (`paper`). Places count from the first token of the packed sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tiles_of_rows(
    places: Tensor, starts: Tensor, margin: int, lag: int, num_rows: int, num_keys: int
) -> Tensor:
    """For each tile of query rows, where its keys change their kind.

    Args:
        places: int64 [rows], ascending.
        starts: int64 [rows], where the row's document begins.
        margin: keys at the beginning of a document that do not count.
        lag: recent keys that do not count.
        num_rows: rows of a tile.
        num_keys: keys of a tile.

    Returns:
        int32 [tiles, 6], ascending places begin, a, b, c, d, end, all but the last multiples of `num_keys`.
        Every row counts every key from a to b and sees, but does not count, every key from c to d.
        Keys from begin to a, b to c and d to end have to be looked at one by one.
    """
    first, last = _ends(places, num_rows)
    earliest, latest = _ends(starts, num_rows)
    begin = earliest // num_keys * num_keys
    end = last + 1
    near_to = _clamp((first + 1) // num_keys * num_keys, begin, end)
    near_from = _clamp(_rounded_up(torch.maximum(last - lag + 1, latest), num_keys), begin, near_to)
    far_to = _clamp((first - lag + 1) // num_keys * num_keys, begin, near_from)
    far_from = _clamp(_rounded_up(latest + margin, num_keys), begin, far_to)
    return torch.stack([begin, far_from, far_to, near_from, near_to, end], 1).to(torch.int32)


def tiles_of_keys(
    places: Tensor,
    starts: Tensor,
    length: int,
    margin: int,
    lag: int,
    num_rows: int,
    num_keys: int,
) -> Tensor:
    """For each tile of keys, the query rows that count any of them.

    Args:
        places: int64 [rows], ascending.
        starts: int64 [rows], where the row's document begins.
        length: keys.
        margin: keys at the beginning of a document that do not count.
        lag: recent keys that do not count.
        num_rows: rows of a tile.
        num_keys: keys of a tile.

    Returns:
        int32 [tiles, 4], ascending numbers of rows first, a, b, end. From a to b, a multiple of `num_rows`,
        every row counts every key of the tile.
    """
    begin = torch.arange(0, length, num_keys, device=places.device)
    final = (begin + num_keys).clamp(max=length) - 1
    first = torch.searchsorted(places, begin + lag)
    end = torch.maximum(torch.searchsorted(starts, final - margin, right=True), first)
    whole_from = first + _rounded_up(torch.searchsorted(places, final + lag) - first, num_rows)
    whole_from = torch.minimum(whole_from, end)
    whole_to = torch.searchsorted(starts, begin - margin, right=True).minimum(end)
    whole_to = whole_from + (whole_to - whole_from).clamp(min=0) // num_rows * num_rows
    return torch.stack([first, whole_from, whole_to, end], 1).to(torch.int32)


def _ends(values: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """First and last value of every tile."""
    first = torch.arange(0, values.numel(), size, device=values.device)
    return values[first], values[(first + size - 1).clamp(max=values.numel() - 1)]


def _rounded_up(values: Tensor, multiple: int) -> Tensor:
    return -(-values // multiple) * multiple


def _clamp(values: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(values, lowest), highest)

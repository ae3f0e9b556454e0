"""Which blocks of keys each block of rows meets: block masks, worked out on the device from lengths alone.

No row's selection is looked at: the few blocks of rows that select meet every block of keys, and
the mask within decides. So a mask needs no look at the data, and no wait for the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
# Lengths are rounded up to so many steps between one power of two and the next: every length that is
# met is compiled for once, and sequences differ by a few tokens.
STEPS_PER_OCTAVE = 16


class BlockTables(NamedTuple):
    """The index tensors of a `BlockMask` of two heads: a local one, and one that retrieves."""

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


def padded_length(length: int) -> int:
    """The length that is computed with: whole blocks, and one of few."""
    step = max(BLOCK, 2 ** (length.bit_length() - 1) // STEPS_PER_OCTAVE)
    return -(-length // step) * step


def block_mask(
    retrieves: Tensor,
    length: int,
    first_selecting: int,
    num_sink_tokens: int,
    sliding_window: int,
    retrieval_window: int,
    mask: Any,
) -> BlockMask:
    """The block mask of a layer.

    Args:
        retrieves: bool [heads].
        length: rows and keys, a multiple of `BLOCK`.
        first_selecting: first row that selects; `length` if none does.
        num_sink_tokens: S.
        sliding_window: of local heads.
        retrieval_window: of rows that select.
        mask: FlexAttention's `mask_mod`, asked within blocks that are seen in part.
    """
    tables = _tables(
        length // BLOCK,
        first_selecting // BLOCK,
        num_sink_tokens,
        sliding_window,
        retrieval_window,
        retrieves.device,
    )
    of_heads = {name: table[:, retrieves.long()] for name, table in tables._asdict().items()}
    return BlockMask((length, length), **of_heads, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask)


@lru_cache(maxsize=8)
def _tables(
    num_blocks: int,
    first_selecting: int,
    num_sink_tokens: int,
    sliding_window: int,
    retrieval_window: int,
    device: torch.device,
) -> BlockTables:
    """Tables for a pair of heads, which all layers of a step share."""
    # Kept for later calls, whatever mode this one is made in.
    with torch.inference_mode(False), torch.no_grad():
        rows = torch.arange(num_blocks, device=device)[:, None]
        columns = torch.arange(num_blocks, device=device)[None]
        seen, before = columns <= rows, columns < rows
        farthest = (rows - columns + 1) * BLOCK - 1
        nearest = farthest - 2 * (BLOCK - 1)
        all_sinks = (columns + 1) * BLOCK <= num_sink_tokens
        near = (nearest < sliding_window) | (columns * BLOCK < num_sink_tokens)
        all_near = (farthest < sliding_window) | all_sinks
        all_near_if_selecting = (farthest < retrieval_window) | all_sinks
        met = torch.stack([seen & near, seen])[None]
        full = torch.stack(
            [before & all_near, before & ((rows < first_selecting) | all_near_if_selecting)]
        )[None]
        parts = met & ~full
        kv, full_kv = _listed(parts), _listed(full)
        q, full_q = _listed(parts.transpose(-1, -2)), _listed(full.transpose(-1, -2))
        return BlockTables(*kv, *full_kv, *q, *full_q)


def _listed(table: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row: how many blocks are set, and the blocks, those first."""
    order = torch.argsort(table.int(), dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()

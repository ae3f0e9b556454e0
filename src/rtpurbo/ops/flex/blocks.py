"""Block masks of FlexAttention, computed on the device from lengths only.

Selections are not part of the block mask: the few query blocks that select are paired with every key block, and
`mask_mod` decides. The block mask therefore needs no synchronisation with the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from rtpurbo.config import AttentionRule

BLOCK = 128
# Lengths are rounded up to this many steps per power of two: each padded length compiles once, while the
# lengths of sequences differ by a few tokens.
STEPS_PER_OCTAVE = 16


def padded_length(length: int) -> int:
    """Length rounded up to whole blocks and to one of few sizes."""
    step = max(BLOCK, 2 ** (length.bit_length() - 1) // STEPS_PER_OCTAVE)
    return -(-length // step) * step


def block_mask(
    retrieves: Tensor, length: int, first_selecting: int, rule: AttentionRule, mask: Any
) -> BlockMask:
    """Block mask of a layer.

    Args:
        retrieves: bool [heads].
        length: queries and keys, a multiple of `BLOCK`.
        first_selecting: first query that selects; `length` if none does.
        rule: sinks, the window of local heads, and that of queries that select.
        mask: FlexAttention's `mask_mod`, applied in partial blocks.
    """
    sizes = rule.num_sink_tokens, rule.sliding_window, rule.near_window
    tables = _tables(length // BLOCK, first_selecting // BLOCK, *sizes, retrieves.device)
    of_heads: list[Any] = [table[:, retrieves.long()] for table in tables]
    options: dict[str, Any] = {"BLOCK_SIZE": (BLOCK, BLOCK), "mask_mod": mask}
    return BlockMask((length, length), *of_heads, **options)


@lru_cache(maxsize=8)
def _tables(
    num_blocks: int,
    first_selecting: int,
    num_sink_tokens: int,
    sliding_window: int,
    retrieval_window: int,
    device: torch.device,
) -> tuple[Tensor, ...]:
    """Index tensors of a `BlockMask` of two heads, a local head and a retrieval head, in the order of its arguments.

    All layers of a step share them.
    """
    # Cached across calls, so created outside of inference mode.
    with torch.inference_mode(False), torch.no_grad():
        query_blocks = torch.arange(num_blocks, device=device)[:, None]
        key_blocks = torch.arange(num_blocks, device=device)[None]
        seen, before = key_blocks <= query_blocks, key_blocks < query_blocks
        farthest = (query_blocks - key_blocks + 1) * BLOCK - 1
        nearest = farthest - 2 * (BLOCK - 1)
        all_sinks = (key_blocks + 1) * BLOCK <= num_sink_tokens
        near = (nearest < sliding_window) | (key_blocks * BLOCK < num_sink_tokens)
        all_near = (farthest < sliding_window) | all_sinks
        all_near_if_selecting = (farthest < retrieval_window) | all_sinks
        met = torch.stack([seen & near, seen])[None]
        full = torch.stack(
            [before & all_near, before & ((query_blocks < first_selecting) | all_near_if_selecting)]
        )[None]
        parts = met & ~full
        kv, full_kv = _compacted(parts), _compacted(full)
        q, full_q = _compacted(parts.transpose(-1, -2)), _compacted(full.transpose(-1, -2))
        return *kv, *full_kv, *q, *full_q


def _compacted(table: Tensor) -> tuple[Tensor, Tensor]:
    """Number of set blocks of each query block, and the blocks with the set ones first."""
    order = torch.argsort(table.int(), dim=-1, descending=True, stable=True)
    return table.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()

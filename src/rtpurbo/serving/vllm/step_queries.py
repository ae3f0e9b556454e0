"""Queries of a step by kernel, computed on the CPU without a loop over requests and sent in one copy per group.

N queries select, P requests have other queries; for other letters see `pages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.eager.heavy_hitters import shortest_prompt
from rtpurbo.serving.vllm.heavy_hitters import with_own_blocks
from rtpurbo.serving.vllm.pages import NULL_BLOCK, LayerCache


@dataclass(frozen=True)
class PromptQueries:
    """Consecutive prompt queries of P requests.

    Attributes:
        offsets: int32 [P], index of the first query of each request.
        counts: int32 [P], number of its queries.
        starts: int32 [P], position of the first one among the keys in the block table.
        block_table: int32 [P, blocks], blocks of these requests.
        most: largest of `counts`, rounded up to a multiple of 16; 0 without requests.
    """

    offsets: Tensor
    counts: Tensor
    starts: Tensor
    block_table: Tensor
    most: int


@dataclass(frozen=True)
class StepQueries:
    """Queries of a step by kernel; the same for all layers of a group.

    Attributes:
        selecting: int64 [N], indices of the selecting queries.
        lengths: int32 [N], tokens of the request up to each of them.
        block_table: int32 [N, blocks], blocks of their requests, with heavy hitters if they follow a prompt.
        prompts: queries that do not select.
        dense: queries that are dense in local heads, which `prompts` or `selecting` contain too.
    """

    selecting: Tensor
    lengths: Tensor
    block_table: Tensor
    prompts: PromptQueries
    dense: PromptQueries


def step_queries(cache: LayerCache, rule: AttentionRule) -> StepQueries:
    """Queries of a step by kernel, computed by the first layer of a group and cached in the batch."""
    batch = cache.batch
    if batch.step_queries is None:
        starts, lengths = batch.starts.numpy(), batch.lengths.numpy()
        num_queries, selecting = batch.num_queries.numpy(), batch.num_selecting(rule).numpy()
        num_prompt = num_queries - selecting
        (prompts,) = np.nonzero(num_prompt)
        first_dense, num_dense = (part.numpy() for part in batch.dense_queries(rule))
        (dense,) = np.nonzero(num_dense)
        requests = np.repeat(np.arange(len(lengths)), selecting)
        # Number of each selecting query among those of its request, counted from the last one.
        from_end = np.repeat(np.cumsum(selecting), selecting) - 1 - np.arange(len(requests))
        prompt_lengths = batch.prompt_lengths.numpy()[requests]
        follows = lengths[requests] - from_end > prompt_lengths
        follows &= prompt_lengths >= shortest_prompt(rule)
        parts = [
            requests,
            (starts[1:] - 1)[requests] - from_end,
            lengths[requests] - from_end,
            prompts,
            starts[prompts],
            num_prompt[prompts],
            (lengths - num_queries)[prompts],
            dense,
            (starts[:-1] + first_dense - lengths + num_queries)[dense],
            num_dense[dense],
            first_dense[dense],
            follows,
        ]
        numbers = _to_device(parts, batch.block_table.device)
        block_table = batch.block_table.index_select(0, numbers[0])
        if cache.own_blocks is not None:
            own_blocks = cache.own_blocks.index_select(0, numbers[0])
            block_table = with_own_blocks(cache, block_table, own_blocks, numbers[11] > 0, rule)
        batch.step_queries = StepQueries(
            selecting=numbers[1].long(),
            lengths=numbers[2],
            block_table=block_table,
            prompts=PromptQueries(
                numbers[4],
                numbers[5],
                numbers[6],
                batch.block_table.index_select(0, numbers[3]),
                rounded_up(int(num_prompt.max(initial=0))),
            ),
            dense=PromptQueries(
                numbers[8],
                numbers[9],
                *_without_null_blocks(
                    numbers[10],
                    batch.block_table.index_select(0, numbers[7]),
                    cache.pages.block_size,
                ),
                rounded_up(int(num_dense.max(initial=0))),
            ),
        )
    assert isinstance(batch.step_queries, StepQueries)
    return batch.step_queries


def _to_device(parts: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copies arrays of integers to the device at once, as int32 tensors.

    Each begins at a multiple of 16 bytes, because Triton compiles another kernel for pointers that do not.
    """
    starts = np.cumsum([0, *(rounded_up(len(part)) for part in parts)])
    host = torch.zeros(int(starts[-1]), dtype=torch.int32, pin_memory=device.type == "cuda")
    for start, part in zip(starts, parts, strict=False):
        host[start : start + len(part)] = torch.from_numpy(part.astype(np.int32))
    numbers = host.to(device, non_blocking=True)
    return [numbers[start : start + len(part)] for start, part in zip(starts, parts, strict=False)]


def rounded_up(number: int) -> int:
    """The next multiple of 16, because Triton compiles other kernels for 1 and for other numbers."""
    return -(-number // 16) * 16


def _without_null_blocks(
    starts: Tensor, block_table: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Moves blocks together where earlier ones are missing, which does not change dense causal attention.

    Args:
        starts: int32 [P], position of the first query of each request.
        block_table: int32 [P, blocks].
        block_size: tokens per block.

    Returns:
        Positions of the queries among the remaining keys, and the new block table.
    """
    if not len(starts):
        return starts, block_table
    numbers = torch.arange(block_table.shape[1], device=block_table.device)
    # Entries after a request's last block are undefined.
    missing = (block_table == NULL_BLOCK) & (numbers < (starts // block_size)[:, None])
    order = missing.int().argsort(stable=True, dim=1)
    return starts - missing.sum(1, dtype=torch.int32) * block_size, block_table.gather(1, order)

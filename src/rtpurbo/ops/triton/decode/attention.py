"""Decode step of a layer: one query token per sequence, in four kernels or five.

1. `window_and_scores`: window attention of every head, and index scores of the far keys with their histogram;
2. `top_p`: selection of the far keys from the histogram;
3. `selected_attention`: attention over the selected keys;
4. `combine`: split-K combine of the partial results.

Where several retrieval heads of a layer have the same KV head, those of each KV head read the union of their
selections together (`SelectionGroups`): the selection is two kernels then, and `group_attention` follows.

The first kernel expects a zeroed histogram, and the last one zeroes it again. Without a histogram workspace
from the caller, a fill precedes the step. Grids and memory depend on shapes alone, so a step can be captured
in a CUDA graph and replayed while the sequences grow within the capacity of the cache.

B sequences, H query heads, R retrieval heads, D head_dim, I index_dim.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.states import HeadLayout, PagedStates, SelectionStatistics, States
from rtpurbo.ops.triton.decode.combine import combine_splits
from rtpurbo.ops.triton.decode.selected_attention import selected_attention
from rtpurbo.ops.triton.decode.top_p import select_top_p
from rtpurbo.ops.triton.decode.window_and_scores import window_and_scores
from rtpurbo.ops.triton.decode.workspace import DecodeStep, Selection
from rtpurbo.ops.triton.heads import MAX_HEAD_DIM

MAX_BLOCK_SIZE = 1024


def decode_step(
    query_states: Tensor,
    full: States,
    windowed: States,
    layout: HeadLayout,
    index_queries: Tensor | None,
    rule: AttentionRule,
    scaling: float,
    statistics: SelectionStatistics | None = None,
    return_log_sum_exp: bool = False,
    sinks: Tensor | None = None,
    output: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Selection | None]:
    """Head-wise attention of one query token per sequence; arguments as in `AttentionCall`.

    Equals `rtpurbo.ops.eager.headwise.headwise_attention`, except that the selection is rounded up to a whole
    level of scores (`top_p`).

    Of full KV heads, `first_slots` maps positions to slots and `length` gives the slots in use; `positions` are not
    read, and unused slots may be uninitialised. Index keys may be float8_e4m3fn: half the bytes, for scores with an
    error of some 3 %. Windowed KV heads are addressed by `positions`; they are paged only if `full` is, with the same
    lengths, and pages outside of sinks and window are not read. Statistics synchronise with the GPU. The output is
    written to `output`, contiguous [B, H, 1, D], if it is given.

    Returns:
        Output [B, H, 1, D], the log-sum-exp [B, H, 1] or None, and the selection; None if all far keys are read
        or no head retrieves.
    """
    queries = query_states if query_states.stride(-1) == 1 else query_states.contiguous()
    if index_queries is not None and index_queries.stride(-1) != 1:
        index_queries = index_queries.contiguous()
    full = _with_first_slots(full, queries.shape[0])
    step = DecodeStep(queries, full, windowed, layout, index_queries, rule, scaling)
    _check(step)
    selection = None
    with torch.cuda.device_of(queries):
        window, scores = window_and_scores(step)
        if sinks is not None:
            window = window.with_sinks(sinks)
        selected = window
        if step.num_retrieval:
            if rule.top_p < 1:
                selection = select_top_p(step, window, scores)
            selected = selected_attention(step, selection)
        workspace = full.histogram_workspace
        workspace = workspace if scores.histogram is workspace else None
        attended, log_sum_exp = combine_splits(
            step, window, selected, workspace, return_log_sum_exp, output
        )
    if statistics is not None and step.num_retrieval:
        _count(statistics, step, selection)
    return attended, log_sum_exp, selection


def _with_first_slots(full: States, batch: int) -> States:
    if isinstance(full, PagedStates) or full.in_order or full.first_slots is not None:
        return full
    if full.keys.shape[1]:
        raise ValueError(
            "the order of the keys is unknown: a decode step needs first_slots or in_order."
        )
    # Without full KV heads, only the position of the query is needed from these states.
    length = torch.full_like(full.positions[:1, 0], full.keys.shape[2])
    if full.length is not None:
        length = full.length.long()
    positions = full.positions.expand(batch, -1).gather(1, (length - 1).expand(batch, 1))[:, 0]
    first_slots = (length - 1 - positions).to(torch.int32)
    return replace(full, first_slots=first_slots)


def _check(step: DecodeStep) -> None:
    rule, head_dim = step.rule, step.queries.shape[-1]
    if step.queries.shape[2] != 1:
        raise ValueError(
            f"a decode step takes one query token per sequence, not {step.queries.shape[2]}."
        )
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}, but the kernels take at most {MAX_HEAD_DIM}.")
    if rule.granularity == "block" and rule.block_size > MAX_BLOCK_SIZE:
        raise ValueError(
            f"block_size is {rule.block_size}, but the kernels take at most {MAX_BLOCK_SIZE}."
        )
    for states in (step.full.keys, step.full.values, step.windowed.keys, step.windowed.values):
        if states.numel() and (states.shape[-1] != head_dim or states.stride(-1) != 1):
            raise ValueError(
                f"keys and values must have {head_dim} contiguous elements per token, as queries have; "
                f"got {states.shape[-1]} with stride {states.stride(-1)}."
            )
    if step.windowed.page_size and not step.full.page_size:
        raise ValueError("windowed states are paged, but full states are not.")
    if step.num_retrieval and (step.index_queries is None or step.full.index_keys is None):
        raise ValueError("retrieval heads need index queries and index keys.")


def _count(statistics: SelectionStatistics, step: DecodeStep, selection: Selection | None) -> None:
    """Adds the keys that the step read to `statistics`."""
    capacity = step.full.capacity
    positions = torch.arange(capacity, device=step.queries.device)
    far = positions <= step.full.query_starts(1)[:, None] - step.rule.near_window
    far &= positions >= step.rule.num_sink_tokens
    far = far[:, None, None]
    if selection is None:
        selected = far.expand(-1, step.num_retrieval, -1, -1)
    else:
        selected = selection.keys(capacity)[:, :, None] & far
    statistics.add(far, selected)

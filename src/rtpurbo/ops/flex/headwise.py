"""A whole layer by FlexAttention, with gradients: the meaning is that of `rtpurbo.ops.eager.headwise`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from rtpurbo.config import AttentionRule
from rtpurbo.ops.flex.blocks import block_mask, padded_length
from rtpurbo.ops.flex.selection import BITS, selected_bits
from rtpurbo.ops.states import HeadLayout, KeyValueStates, SelectionStatistics

# How newer versions of PyTorch are asked for the log-sum-exp.
AuxRequest: Any = getattr(flex, "AuxRequest", None)

HALF = (torch.float16, torch.bfloat16)
# Shorter sequences are done before their kernels are compiled.
WORTH_COMPILING = 1024
# Shapes that are compiled for before PyTorch gives up.
MAX_SHAPES = 64

# Room for rows that select comes in multiples of this, for the same reason as lengths do.
SELECTING_ROWS = 256

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def headwise_attention(
    query_states: Tensor,
    query_positions: Tensor,
    full: KeyValueStates,
    bounded: KeyValueStates,
    layout: HeadLayout,
    index_queries: Tensor | None,
    rule: AttentionRule,
    *,
    scaling: float,
    statistics: SelectionStatistics | None = None,
    return_log_sum_exp: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """All heads of a layer in one launch: windows, dense retrieval heads, and the last rows' selections.

    Arguments and results as in `rtpurbo.ops.eager.headwise.headwise_attention`. Nothing of the size
    of queries times keys is ever made: rows that select, which are few, keep a bit a key.
    """
    length = query_states.shape[2]
    queries, keys, values = _at_one_precision(
        query_states,
        _joined(full.keys, bounded.keys, layout),
        _joined(full.values, bounded.values, layout),
    )
    # What is measured in half precision elsewhere is measured in the states' own here.
    with torch.autocast(query_states.device.type, enabled=False):
        padded = padded_length(length)
        mask = _mask(
            query_states, query_positions, full, layout, index_queries, rule, scaling, statistics,
            padded,
        )  # fmt: skip
        padding = (0, 0, 0, padded - length)
        if padded > length:
            queries, keys, values = (F.pad(part, padding) for part in (queries, keys, values))
        attend, tiles = _attend, None
        if query_states.is_cuda:
            attend, tiles = _compiled(), _tiles(query_states.device, query_states.shape[-1])
        output, log_sum_exp = attend(
            queries, keys, values, mask, scaling, return_log_sum_exp, tiles
        )
    if log_sum_exp is not None:
        log_sum_exp = log_sum_exp[:, :, :length]
    return output[:, :, :length], log_sum_exp


def _mask(
    query_states: Tensor,
    query_positions: Tensor,
    full: KeyValueStates,
    layout: HeadLayout,
    index_queries: Tensor | None,
    rule: AttentionRule,
    scaling: float,
    statistics: SelectionStatistics | None,
    padded: int,
) -> BlockMask:
    """The block mask of a layer over `padded` rows and keys."""
    batch, num_heads, length, _ = query_states.shape
    retrieves, windows = _of_heads(layout, rule, num_heads)
    if index_queries is None or not len(layout.retrieval):
        first = padded
        bits = _nothing_selected(batch, num_heads, padded // BITS, query_states.device)
    else:
        selecting = index_queries.shape[2]
        first = length - selecting
        bits = selected_bits(
            query_states, query_positions, full, layout, index_queries, rule, scaling,
            -(-selecting // SELECTING_ROWS) * SELECTING_ROWS, padded, statistics,
        )  # fmt: skip
    # A number in a tensor: as a plain one it would be compiled in. Filled, not copied, on the device.
    start = torch.full((), first, dtype=torch.int32, device=query_states.device)
    return block_mask(
        retrieves,
        padded,
        first,
        rule.num_sink_tokens,
        rule.sliding_window,
        rule.near_window,
        _entries(retrieves, windows, rule.num_sink_tokens, start, bits),
    )


def _entries(
    retrieves: Tensor, windows: Tensor, num_sink_tokens: int, start: Tensor, bits: Tensor
) -> Mask:
    """Who sees whom: local heads sinks and window, retrieval heads everything before them.

    But rows of retrieval heads from `start` on see what lies near and what they selected. One function
    for all layers, whether their rows select or not, so that one kernel is compiled for them.
    """
    last = bits.shape[2] - 1

    def mask(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        is_near = (row - column < windows[head]) | (column < num_sink_tokens)
        selecting = torch.clamp(row - start, 0, last)
        word = bits[batch, head, selecting, column >> 5]
        is_selected = ((word >> (column & 31)) & 1) != 0
        return (column <= row) & (is_near | (retrieves[head] & ((row < start) | is_selected)))

    return mask


@lru_cache(maxsize=2)
def _nothing_selected(batch: int, num_heads: int, num_words: int, device: torch.device) -> Tensor:
    """Bits of rows that select nothing, shared by all layers in which none does."""
    with torch.inference_mode(False):
        return torch.zeros(
            batch, num_heads, SELECTING_ROWS, num_words, dtype=torch.int32, device=device
        )


def _of_heads(layout: HeadLayout, rule: AttentionRule, num_heads: int) -> tuple[Tensor, Tensor]:
    """Of each head, whether it retrieves and its window: bool and int32 [heads], made once."""
    key = ("flex", rule.sliding_window, rule.near_window)
    if key not in layout.derived:
        with torch.inference_mode(False):
            heads = layout.retrieval.heads
            retrieves = torch.zeros(num_heads, dtype=torch.bool, device=heads.device)
            # Filled, as assigning through an index would wait for the device.
            retrieves.index_fill_(0, heads, True)
            windows = torch.full_like(retrieves, rule.sliding_window, dtype=torch.int32)
            windows.index_fill_(0, heads, rule.near_window)
        layout.derived[key] = retrieves, windows
    return layout.derived[key]


def _joined(full: Tensor, bounded: Tensor, layout: HeadLayout) -> Tensor:
    """States of all KV heads, in their order."""
    if not layout.full_key_value_heads.numel() or not layout.windowed_key_value_heads.numel():
        return full if layout.full_key_value_heads.numel() else bounded
    if "flex_order" not in layout.derived:
        with torch.inference_mode(False):
            heads = torch.cat([layout.full_key_value_heads, layout.windowed_key_value_heads])
            layout.derived["flex_order"] = heads.argsort()
    return torch.cat([full, bounded], 1)[:, layout.derived["flex_order"]]


def _at_one_precision(*states: Tensor) -> list[Tensor]:
    """States in the type that autocast asks for, where it is on: norms may have left it."""
    device = states[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(states)
    return [part.to(torch.get_autocast_dtype(device)) for part in states]


def _attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: BlockMask,
    scaling: float,
    return_log_sum_exp: bool,
    tiles: dict[str, int] | None,
) -> tuple[Tensor, Tensor | None]:
    options: dict[str, Any] = {"block_mask": mask, "scale": scaling, "kernel_options": tiles}
    options["enable_gqa"] = queries.shape[1] != keys.shape[1]
    if not return_log_sum_exp:
        return flex_attention(queries, keys, values, **options), None
    if AuxRequest is None:
        return flex_attention(queries, keys, values, return_lse=True, **options)
    output, besides = flex_attention(
        queries, keys, values, return_aux=AuxRequest(lse=True), **options
    )
    return output, besides.lse


@cache
def _tiles(device: torch.device, head_dim: int) -> dict[str, int]:
    """Sizes of the forward kernel's tiles that shared memory has room for.

    The compiler keeps the words of `bits` for the pairs of a tile there too, 4 bytes a pair and stage,
    of which PyTorch's own choice knows nothing: with head_dim 64 it asks an H100 for 240 KiB of 227.
    """
    properties: Any = torch.cuda.get_device_properties(device)
    kibibytes = properties.shared_memory_per_block_optin / 1024
    return {
        "fwd_BLOCK_M": 128 if kibibytes >= 160 else 64,
        "fwd_BLOCK_N": 64,
        "fwd_num_stages": 3 if kibibytes >= 200 and head_dim <= 128 else 2,
    }


@cache
def _compiled() -> Any:
    """Kernels for each shape that is met; uncompiled, every score of every head would be held."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_SHAPES)
    return torch.compile(_attend, dynamic=False, fullgraph=True)


def pays(query_states: Tensor, full: KeyValueStates, bounded: KeyValueStates) -> bool:
    """Whether a call that leaves the choice should come here: gradients of a long sequence, on a GPU."""
    tensors = [query_states, full.keys, full.values, bounded.keys, bounded.values]
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in tensors):
        return False
    [queries] = _at_one_precision(query_states[:, :, :0])
    _, _, length, head_dim = query_states.shape
    is_suited = queries.is_cuda and queries.dtype in HALF and head_dim < 256
    return is_suited and length >= WORTH_COMPILING


def refusals(
    query_states: Tensor,
    full: KeyValueStates,
    bounded: KeyValueStates,
    index_queries: Tensor | None,
    rule: AttentionRule,
) -> Iterator[str]:
    """Why FlexAttention cannot serve such a call; nothing if it can."""
    length = query_states.shape[2]
    tensors = [query_states, full.keys, full.values, bounded.keys, bounded.values]
    for states in (full, bounded):
        is_whole = states.in_order and states.length is None and states.keys.shape[2] == length
        if states.keys.shape[1] and not is_whole:
            yield "it takes whole sequences alone, without padding and without a cache"
    if index_queries is not None and rule.prefill_mode != "dense":
        yield f"all rows of a prompt select by '{rule.prefill_mode}', and it lets only the last ones select"
    if len({tensor.dtype for tensor in tensors}) > 1 and not torch.is_autocast_enabled(
        query_states.device.type
    ):
        yield "queries, keys and values differ in their type"
    if not query_states.is_cuda and torch.is_grad_enabled():
        if any(tensor.requires_grad for tensor in tensors):
            yield "it computes no gradients on a CPU"
    elif query_states.is_cuda and query_states.shape[-1] < 16:
        yield f"head_dim {query_states.shape[-1]} is below 16"

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
from rtpurbo.ops.sinks import with_sinks
from rtpurbo.ops.states import AttentionCall, HeadLayout

# Newer versions of PyTorch return the log-sum-exp by this request.
AuxRequest: Any = getattr(flex, "AuxRequest", None)

HALF = (torch.float16, torch.bfloat16)
# Shorter sequences finish in eager mode before a kernel is compiled.
MIN_COMPILED_LENGTH = 1024
# Shapes that are compiled before PyTorch falls back to eager mode.
MAX_SHAPES = 64

# The number of selecting queries is rounded up to multiples of this, to compile fewer shapes.
SELECTING_QUERIES = 256

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def headwise_attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """All heads of a layer in one kernel: windows, dense retrieval heads, and selections of the last queries.

    Results as of `rtpurbo.ops.eager.headwise.headwise_attention`. No tensor of the size of queries times keys is
    created, except one bit per key for the few queries that select.
    """
    length, is_cuda = call.query_states.shape[2], call.query_states.is_cuda
    queries, keys, values = _at_one_precision(
        call.query_states,
        _joined(call.full.keys, call.windowed.keys, call.layout),
        _joined(call.full.values, call.windowed.values, call.layout),
    )
    # Index scores and logits are computed in the dtype of the states, not in that of autocast.
    with torch.autocast(call.query_states.device.type, enabled=False):
        padded = padded_length(length)
        mask = _mask(call, padded)
        if padded > length:
            padding = (0, 0, 0, padded - length)
            queries, keys, values = (F.pad(part, padding) for part in (queries, keys, values))
        attend, tiles = _attend, None
        if is_cuda:
            attend = _compiled()
            tiles = _tiles(call.query_states.device, call.query_states.shape[-1])
        needs_log_sum_exp = call.return_log_sum_exp or call.sinks is not None
        output, log_sum_exp = attend(
            queries, keys, values, mask, call.scaling, needs_log_sum_exp, tiles
        )
    output = output[:, :, :length]
    if log_sum_exp is not None:
        log_sum_exp = log_sum_exp[:, :, :length]
        if call.sinks is not None:
            output, log_sum_exp = with_sinks(output, log_sum_exp, call.sinks)
    return output, log_sum_exp if call.return_log_sum_exp else None


def _mask(call: AttentionCall, padded: int) -> BlockMask:
    """Block mask of a layer over `padded` queries and keys."""
    rule, device = call.rule, call.query_states.device
    batch, num_heads, length, _ = call.query_states.shape
    retrieves, windows = _of_heads(call.layout, rule, num_heads)
    if call.index_queries is None or not len(call.layout.retrieval):
        first = padded
        bits = _nothing_selected(batch, num_heads, padded // BITS, device)
    else:
        selecting = call.index_queries.shape[2]
        first = length - selecting
        bits = selected_bits(call, -(-selecting // SELECTING_QUERIES) * SELECTING_QUERIES, padded)
    # A tensor, since a Python number would be compiled in; filled on the device, without a copy.
    start = torch.full((), first, dtype=torch.int32, device=device)
    mask = _mask_mod(retrieves, windows, rule.num_sink_tokens, start, bits)
    return block_mask(retrieves, padded, first, rule, mask)


def _mask_mod(
    retrieves: Tensor, windows: Tensor, num_sink_tokens: int, start: Tensor, bits: Tensor
) -> Mask:
    """`mask_mod`: sinks and window for local heads, all earlier keys for retrieval heads.

    Queries of retrieval heads from `start` on attend to near and selected keys only. All layers share the
    function, with or without selections, so that they share one compiled kernel.
    """
    last = bits.shape[2] - 1

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_near = (query - key < windows[head]) | (key < num_sink_tokens)
        selecting = torch.clamp(query - start, 0, last)
        word = bits[batch, head, selecting, key >> 5]
        is_selected = ((word >> (key & 31)) & 1) != 0
        return (key <= query) & (is_near | (retrieves[head] & ((query < start) | is_selected)))

    return mask


@lru_cache(maxsize=2)
def _nothing_selected(batch: int, num_heads: int, num_words: int, device: torch.device) -> Tensor:
    """Bit masks of queries that select nothing, shared by all layers without selections."""
    with torch.inference_mode(False):
        return torch.zeros(
            batch, num_heads, SELECTING_QUERIES, num_words, dtype=torch.int32, device=device
        )


def _of_heads(layout: HeadLayout, rule: AttentionRule, num_heads: int) -> tuple[Tensor, Tensor]:
    """Retrieval flag and window of each head: bool and int32 [heads], cached per layout."""
    key = ("flex", rule.sliding_window, rule.near_window)
    if key not in layout.derived:
        with torch.inference_mode(False):
            heads = layout.retrieval.heads
            retrieves = torch.zeros(num_heads, dtype=torch.bool, device=heads.device)
            # Index assignment would synchronise with the device.
            retrieves.index_fill_(0, heads, True)
            windows = torch.full_like(retrieves, rule.sliding_window, dtype=torch.int32)
            windows.index_fill_(0, heads, rule.near_window)
        layout.derived[key] = retrieves, windows
    return layout.derived[key]


def _joined(full: Tensor, windowed: Tensor, layout: HeadLayout) -> Tensor:
    """States of all KV heads, in head order."""
    if not layout.full_key_value_heads.numel() or not layout.windowed_key_value_heads.numel():
        return full if layout.full_key_value_heads.numel() else windowed
    if "flex_order" not in layout.derived:
        with torch.inference_mode(False):
            heads = torch.cat([layout.full_key_value_heads, layout.windowed_key_value_heads])
            layout.derived["flex_order"] = heads.argsort()
    return torch.cat([full, windowed], 1)[:, layout.derived["flex_order"]]


def _at_one_precision(*states: Tensor) -> list[Tensor]:
    """Casts states to the dtype of autocast, if it is on: norms may have changed it."""
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
    output, auxiliary = flex_attention(
        queries, keys, values, return_aux=AuxRequest(lse=True), **options
    )
    return output, auxiliary.lse


@cache
def _tiles(device: torch.device, head_dim: int) -> dict[str, int]:
    """Tile sizes of the forward kernel that fit into shared memory.

    The kernel also keeps the words of `bits` in shared memory, 4 bytes per pair and stage, which PyTorch's default
    does not account for: with head_dim 64 it requests 240 KiB of an H100's 227.
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
    """Compiled kernel, one per shape; eager FlexAttention would materialise all scores."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_SHAPES)
    return torch.compile(_attend, dynamic=False, fullgraph=True)


def is_profitable(call: AttentionCall) -> bool:
    """Returns True if `auto` should use FlexAttention: gradients of a long sequence on a GPU."""
    if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in _tensors(call)):
        return False
    [queries] = _at_one_precision(call.query_states[:, :, :0])
    _, _, length, head_dim = call.query_states.shape
    is_supported = queries.is_cuda and queries.dtype in HALF and head_dim < 256
    return is_supported and length >= MIN_COMPILED_LENGTH


def _tensors(call: AttentionCall) -> list[Tensor]:
    states = (call.full.keys, call.full.values, call.windowed.keys, call.windowed.values)
    return [call.query_states, *states]


def unsupported_reasons(call: AttentionCall) -> Iterator[str]:
    """Yields the reasons for which FlexAttention does not support a call."""
    queries, tensors = call.query_states, _tensors(call)
    for states in (call.full, call.windowed):
        is_whole = states.in_order and states.length is None
        if states.keys.shape[1] and not (is_whole and states.keys.shape[2] == queries.shape[2]):
            yield "FlexAttention takes whole sequences only, without padding and without a cache"
    mode = call.rule.prefill_mode
    if call.index_queries is not None and mode != "dense":
        yield f"with prefill_mode '{mode}' all queries select, but only the last ones may"
    is_autocast = torch.is_autocast_enabled(queries.device.type)
    if len({tensor.dtype for tensor in tensors}) > 1 and not is_autocast:
        yield "queries, keys and values differ in dtype"
    if not queries.is_cuda and torch.is_grad_enabled():
        if any(tensor.requires_grad for tensor in tensors):
            yield "FlexAttention computes no gradients on a CPU"
    elif queries.is_cuda and queries.shape[-1] < 16:
        yield f"head_dim {queries.shape[-1]} is below 16"

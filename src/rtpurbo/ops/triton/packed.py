"""Dense attention of packed documents by the prefill kernels, one launch a document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.states import HeadLayout, KeyValueStates
from rtpurbo.ops.triton.heads import MAX_HEAD_DIM, takes_head_dim
from rtpurbo.ops.triton.headwise import prefill_attention

# Of heads that all read everything, only this is asked: they have no window.
DENSE = AttentionRule()


def packed_attention(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    document_lengths: Sequence[int],
    *,
    scaling: float,
) -> Tensor:
    """As `rtpurbo.ops.eager.packed.packed_attention`."""
    heads, key_value_heads = query_states.shape[1], key_states.shape[1]
    layout = _all_dense(heads, key_value_heads, query_states.device)
    lengths = list(document_lengths)
    outputs = []
    for queries, keys, values in zip(
        query_states.split(lengths, 2),
        key_states.split(lengths, 2),
        value_states.split(lengths, 2),
        strict=True,
    ):
        positions = _positions(keys.shape[0], keys.shape[2], keys.device)
        full = KeyValueStates(keys, values, positions, in_order=True)
        nothing = KeyValueStates(keys[:, :0], values[:, :0], positions, in_order=True)
        output, _ = prefill_attention(queries, full, nothing, layout, None, DENSE, scaling=scaling)
        outputs.append(output)
    if len(outputs) == 1:
        return outputs[0]
    # Heads side by side in memory, as the output projection wants them.
    return torch.cat([output.transpose(1, 2) for output in outputs], 1).transpose(1, 2)


def refusals(query_states: Tensor, key_states: Tensor, value_states: Tensor) -> Iterator[str]:
    """Why these kernels cannot serve such a call; nothing if they can."""
    tensors = (query_states, key_states, value_states)
    head_dim = query_states.shape[-1]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        yield "they compute no gradients"
    if len({tensor.dtype for tensor in tensors}) > 1:
        yield "queries, keys and values differ in their type"
    if not takes_head_dim(head_dim, query_states.dtype):
        yield f"head_dim {head_dim} is not a multiple of 16 bytes, or above {MAX_HEAD_DIM}"
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        yield "the last dimension of a tensor is not contiguous"


@cache
def _all_dense(heads: int, key_value_heads: int, device: torch.device) -> HeadLayout:
    return HeadLayout.build(range(heads), heads, key_value_heads, device)


def _positions(batch: int, length: int, device: torch.device) -> Tensor:
    """Nobody reads them where keys lie in order."""
    return torch.zeros((), dtype=torch.int64, device=device).expand(batch, length)

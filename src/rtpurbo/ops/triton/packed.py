"""Dense attention of packed documents with the prefill kernels, one launch per document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.states import HeadLayout, KeyValueStates
from rtpurbo.ops.triton.heads import MAX_HEAD_DIM, supports_head_dim
from rtpurbo.ops.triton.headwise import prefill_attention

# Dense heads have no window: only the number of sinks is read from the rule.
DENSE = AttentionRule()


def packed_attention(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    document_lengths: Sequence[int],
    *,
    scaling: float,
) -> Tensor:
    """Same as `rtpurbo.ops.eager.packed.packed_attention`."""
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
    # Laid out as [batch, length, heads, head_dim], which the output projection reads without a copy.
    return torch.cat([output.transpose(1, 2) for output in outputs], 1).transpose(1, 2)


def unsupported_reasons(
    query_states: Tensor, key_states: Tensor, value_states: Tensor
) -> Iterator[str]:
    """Yields the reasons for which the kernels do not support a call."""
    tensors = (query_states, key_states, value_states)
    head_dim = query_states.shape[-1]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        yield "the kernels compute no gradients"
    if len({tensor.dtype for tensor in tensors}) > 1:
        yield "queries, keys and values differ in dtype"
    if not supports_head_dim(head_dim, query_states.dtype):
        yield f"head_dim {head_dim} is not a multiple of 16 bytes, or above {MAX_HEAD_DIM}"
    if any(tensor.stride(-1) != 1 for tensor in tensors):
        yield "the last dimension of a tensor is not contiguous"


@cache
def _all_dense(heads: int, key_value_heads: int, device: torch.device) -> HeadLayout:
    return HeadLayout.build(range(heads), heads, key_value_heads, device)


def _positions(batch: int, length: int, device: torch.device) -> Tensor:
    """Placeholder: positions are not read where keys are in order."""
    return torch.zeros((), dtype=torch.int64, device=device).expand(batch, length)

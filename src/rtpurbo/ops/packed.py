"""Operators on packed documents; attention never crosses the boundary of a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.devices import has_triton
from rtpurbo.ops.api import (
    attend_with,
    chosen_backend,
    implementation,
    require_triton,
    unsupported_reason,
)
from rtpurbo.ops.states import AttentionCall, KeyValueStates, uniform_layout

# Dense heads have no window, so no other field of it is read than the number of sinks.
_DENSE = AttentionRule()


def document_starts(document_lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """Index of the first token of each token's document: int64 [length]."""
    lengths = torch.tensor(document_lengths, device=device)
    return (lengths.cumsum(0) - lengths).repeat_interleave(lengths)


def packed_attention(
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    document_lengths: Sequence[int],
    *,
    scaling: float,
    positions: Tensor | None = None,
    first_slots: Tensor | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Dense causal attention of every head within its document: one call for each, which needs no mask.

    Args:
        query_states: [batch, num_attention_heads, length, head_dim], after RoPE.
        key_states: [batch, num_key_value_heads, length, head_dim].
        value_states: the same shape (the last size may differ).
        document_lengths: tokens of each document in order; the same for every sequence of the batch.
        scaling: factor on the dot products.
        positions: int64 [batch, length], -1 for padding; None without padding.
        first_slots: int32 [batch], as `KeyValueStates.first_slots`, of a single document; kernels need it with
            padding.
        sinks: learned sinks [num_attention_heads].
        backend: as of `headwise_attention`, but gradients are computed by PyTorch's own kernels.

    Returns:
        [batch, num_attention_heads, length, head_dim].
    """
    batch, heads, length, _ = query_states.shape
    if sum(document_lengths) != length or min(document_lengths, default=0) < 1:
        raise ValueError(
            f"document_lengths are {list(document_lengths)}, but must be positive and sum to {length}."
        )
    in_order = positions is None
    if positions is None:
        positions = torch.arange(length, device=query_states.device).expand(batch, length)
    states = KeyValueStates(
        key_states, value_states, positions, in_order=in_order, first_slots=first_slots
    )
    nothing = replace(states, keys=key_states[:, :0], values=value_states[:, :0])
    layout = uniform_layout(heads, key_states.shape[1], query_states.device, retrieves=True)
    call = AttentionCall(
        query_states, positions, states, nothing, layout, None, _DENSE, scaling, sinks=sinks
    )
    chosen = chosen_backend(backend, call)
    group = heads // key_states.shape[1]
    outputs, start = [], 0
    for count in document_lengths:
        rows = slice(start, start + count)
        queries, document = query_states[:, :, rows], states.tokens(rows)
        # A single query would be a decode step, whose kernels need index queries.
        uses_kernels = chosen == "triton" and count > 1
        if in_order and sinks is None and not uses_kernels:
            output = F.scaled_dot_product_attention(
                queries,
                document.keys.repeat_interleave(group, 1),
                document.values.repeat_interleave(group, 1),
                is_causal=True,
                scale=scaling,
            )
        else:
            of_document = replace(
                call,
                query_states=queries,
                query_positions=positions[:, rows],
                full=document,
                windowed=nothing.tokens(rows),
            )
            output, _ = attend_with("triton" if uses_kernels else "eager", of_document)
        outputs.append(output)
        start += count
    if len(outputs) == 1:
        return outputs[0]
    # Laid out as [batch, length, heads, head_dim], which the output projection reads without a copy.
    return torch.cat([output.transpose(1, 2) for output in outputs], 1).transpose(1, 2)


def indexer_divergence(
    query_states: Tensor,
    key_states: Tensor,
    key_value_heads: Tensor,
    index_queries: Tensor,
    index_keys: Tensor,
    query_indices: Tensor,
    starts: Tensor,
    rule: AttentionRule,
    *,
    scaling: float,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Loss of stage 1; see `rtpurbo.ops.eager.divergence.indexer_divergence`."""
    heads, num_queries, head_dim = query_states.shape
    length = key_states.shape[1]
    expected = {
        "key_states": (key_states, (key_states.shape[0], length, head_dim)),
        "index_queries": (index_queries, (heads, num_queries, index_queries.shape[-1])),
        "index_keys": (index_keys, (heads, length, index_queries.shape[-1])),
        "key_value_heads": (key_value_heads, (heads,)),
        "query_indices": (query_indices, (num_queries,)),
        "starts": (starts, (length,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} are {tuple(tensor.shape)}, but must be {shape}.")
    tensors = (query_states, key_states, index_queries)
    options = {} if sinks is None else {"sinks": sinks}  # only the eager backend takes them
    operator = implementation("indexer_divergence", divergence_backend(*tensors, backend))
    return operator(
        query_states, key_states, key_value_heads, index_queries, index_keys, query_indices, starts, rule,
        scaling=scaling, **options,
    )  # fmt: skip


def divergence_backend(
    query_states: Tensor, key_states: Tensor, index_queries: Tensor, backend: str = "auto"
) -> str:
    """Backend that `indexer_divergence` uses for a call.

    Raises:
        ValueError: the backend given by name is unknown or does not support the call.
    """
    if backend == "eager" or (backend == "auto" and not (query_states.is_cuda and has_triton())):
        return "eager"
    if backend not in ("auto", "triton"):
        raise ValueError(
            f"backend '{backend}' has no operator 'indexer_divergence': choose 'auto', 'eager' or "
            "'triton'."
        )
    require_triton(query_states)
    tensors = (query_states, key_states, index_queries)
    reason = unsupported_reason("indexer_divergence", "triton", *tensors)
    if reason is None:
        return "triton"
    if backend == "auto":
        return "eager"
    raise ValueError(
        f"backend 'triton' does not support this call: {reason}. Choose backend 'eager'."
    )

"""Operators on packed documents: argument checks, choice of the backend, dispatch.

Shapes and semantics are documented in the specification, `rtpurbo.ops.eager`. Attention never crosses the
boundary of a document.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.devices import has_triton
from rtpurbo.ops.backends import HALF, implementation, require_triton, unsupported_reason


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
    backend: str = "auto",
) -> Tensor:
    """Dense attention within documents; see `rtpurbo.ops.eager.packed.packed_attention`."""
    length = query_states.shape[2]
    if sum(document_lengths) != length or min(document_lengths, default=0) < 1:
        raise ValueError(
            f"document_lengths are {list(document_lengths)}, but must be positive and sum to {length}."
        )
    is_supported = query_states.is_cuda and query_states.dtype in HALF
    tensors = (query_states, key_states, value_states)
    chosen = _chosen("packed_attention", backend, is_supported, tensors)
    operator = implementation("packed_attention", chosen)
    return operator(query_states, key_states, value_states, document_lengths, scaling=scaling)


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
        ValueError: the backend given by name does not support the call.
    """
    tensors = (query_states, key_states, index_queries)
    return _chosen("indexer_divergence", backend, query_states.is_cuda, tensors)


def _chosen(name: str, backend: str, is_supported: bool, tensors: tuple[Tensor, ...]) -> str:
    """Backend of an operator on packed documents.

    Args:
        name: operator.
        backend: `auto`, `eager` or `triton`.
        is_supported: `auto` prefers kernels on this device and dtype.
        tensors: arguments of the kernels' `unsupported_reasons`.

    Raises:
        ValueError: the backend given by name is unknown or does not support the call.
    """
    if backend == "eager" or (backend == "auto" and not (is_supported and has_triton())):
        return "eager"
    if backend not in ("auto", "triton"):
        raise ValueError(
            f"backend '{backend}' has no operator '{name}': choose 'auto', 'eager' or 'triton'."
        )
    require_triton(tensors[0])
    reason = unsupported_reason(name, "triton", *tensors)
    if reason is None:
        return "triton"
    if backend == "auto":
        return "eager"
    raise ValueError(
        f"backend 'triton' does not support this call: {reason}. Choose backend 'eager'."
    )

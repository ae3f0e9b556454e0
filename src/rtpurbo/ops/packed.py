"""Operators over documents that are packed in one sequence: check, choose a backend, call it.

Shapes and meaning are documented at the specification, `rtpurbo.ops.eager`. Nothing is seen across
the boundary of a document.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.devices import has_triton
from rtpurbo.ops.api import BACKENDS, HALF


def document_starts(document_lengths: Sequence[int], device: torch.device | str) -> Tensor:
    """For each token of packed documents, the place where its document begins: int64 [length]."""
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
    """Every head dense within its document: `rtpurbo.ops.eager.packed.packed_attention`."""
    length = query_states.shape[2]
    if sum(document_lengths) != length or min(document_lengths, default=0) < 1:
        raise ValueError(
            f"documents of {list(document_lengths)} tokens do not make up a sequence of {length}."
        )
    is_suited = query_states.is_cuda and query_states.dtype in HALF
    tensors = (query_states, key_states, value_states)
    operator = _implementation("packed_attention", backend, is_suited, tensors)
    return operator(query_states, key_states, value_states, document_lengths, scaling=scaling)


def indexer_divergence(
    query_states: Tensor,
    key_states: Tensor,
    key_value_heads: Tensor,
    index_queries: Tensor,
    index_keys: Tensor,
    rows: Tensor,
    starts: Tensor,
    rule: AttentionRule,
    *,
    scaling: float,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """The loss of stage 1: `rtpurbo.ops.eager.divergence.indexer_divergence`."""
    heads, num_rows, head_dim = query_states.shape
    length = key_states.shape[1]
    expected = {
        "key_states": (key_states, (key_states.shape[0], length, head_dim)),
        "index_queries": (index_queries, (heads, num_rows, index_queries.shape[-1])),
        "index_keys": (index_keys, (heads, length, index_queries.shape[-1])),
        "key_value_heads": (key_value_heads, (heads,)),
        "rows": (rows, (num_rows,)),
        "starts": (starts, (length,)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} are {tuple(tensor.shape)}, but must be {shape}.")
    tensors = (query_states, key_states, index_queries)
    options = {} if sinks is None else {"sinks": sinks}  # kernels do not know them
    operator = _implementation("indexer_divergence", backend, query_states.is_cuda, tensors)
    return operator(
        query_states, key_states, key_value_heads, index_queries, index_keys, rows, starts, rule,
        scaling=scaling, **options,
    )  # fmt: skip


def divergence_backend(
    query_states: Tensor, key_states: Tensor, index_queries: Tensor, backend: str = "auto"
) -> str:
    """The backend that `indexer_divergence` will use for such a call.

    Raises:
        ValueError: the backend named cannot serve the call.
    """
    tensors = (query_states, key_states, index_queries)
    return _chosen("indexer_divergence", backend, query_states.is_cuda, tensors)


def _implementation(name: str, backend: str, is_suited: bool, tensors: tuple[Tensor, ...]) -> Any:
    chosen = _chosen(name, backend, is_suited, tensors)
    return getattr(import_module(BACKENDS[chosen][name]), name)


def _chosen(name: str, backend: str, is_suited: bool, tensors: tuple[Tensor, ...]) -> str:
    """The backend named; for `auto`, kernels where they suit and can serve.

    Raises:
        ValueError: the backend named is unknown or cannot serve the call.
    """
    if backend == "eager" or (backend == "auto" and not (is_suited and has_triton())):
        return "eager"
    if backend not in ("auto", "triton"):
        raise ValueError(
            f"backend '{backend}' has no operator '{name}': choose 'auto', 'eager' or 'triton'."
        )
    if not has_triton():
        raise ValueError("backend 'triton' needs the package triton: pip install triton.")
    if not tensors[0].is_cuda and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        raise ValueError("backend 'triton' needs a GPU: move the model there, or choose 'eager'.")
    reason = next(import_module(BACKENDS["triton"][name]).refusals(*tensors), None)
    if reason is None:
        return "triton"
    if backend == "auto":
        return "eager"
    raise ValueError(f"the kernels cannot serve this call: {reason}. Choose backend 'eager'.")

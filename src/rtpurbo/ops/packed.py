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
from rtpurbo.ops.api import BACKENDS, has_triton

HALF = (torch.float16, torch.bfloat16)


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
    operator = _operator(
        "packed_attention",
        backend,
        query_states.is_cuda and query_states.dtype in HALF,
        (query_states, key_states, value_states),
    )
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
    operator = _operator(
        "indexer_divergence",
        backend,
        query_states.is_cuda,
        (query_states, key_states, index_queries),
    )
    return operator(
        query_states, key_states, key_value_heads, index_queries, index_keys, rows, starts, rule,
        scaling=scaling,
    )  # fmt: skip


def _operator(name: str, backend: str, is_suited: bool, tensors: tuple[Tensor, ...]) -> Any:
    """The implementation that a backend names; `auto` takes kernels where they suit and can serve.

    Raises:
        ValueError: the backend named is unknown or cannot serve the call.
    """
    if backend not in ("auto", *BACKENDS) or name not in BACKENDS.get(backend, {name: ""}):
        raise ValueError(
            f"backend '{backend}' has no operator '{name}': choose 'auto', 'eager' or 'triton'."
        )
    if backend == "triton":
        if not has_triton():
            raise ValueError("backend 'triton' needs the package triton: pip install triton.")
        if not tensors[0].is_cuda and not os.environ.get("TRITON_INTERPRET"):
            raise ValueError(
                "backend 'triton' needs a GPU: move the model there, or choose 'eager'."
            )
    if backend == "eager" or (backend == "auto" and not (is_suited and has_triton())):
        return getattr(import_module(BACKENDS["eager"][name]), name)
    kernels = import_module(BACKENDS["triton"][name])
    reason = next(kernels.refusals(*tensors), None)
    if reason is None:
        return getattr(kernels, name)
    if backend == "auto":
        return getattr(import_module(BACKENDS["eager"][name]), name)
    raise ValueError(f"the kernels cannot serve this call: {reason}. Choose backend 'eager'.")

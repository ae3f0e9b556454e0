"""The loss of stage 1 of some heads and rows, backpropagated to the indexers' weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.eager.visibility import query_chunks
from rtpurbo.ops.packed import divergence_backend, indexer_divergence
from rtpurbo.training.capture import CapturedHeads
from rtpurbo.training.packing import RowChoice


def backpropagate(
    seen: CapturedHeads, choice: RowChoice, rule: AttentionRule, *, backend: str = "auto"
) -> Tensor:
    """Adds to the gradients of the indexers' weights.

    Args:
        seen: states of some heads over a packed sequence.
        choice: rows, and what their losses count for.
        rule: reading, sinks and window.
        backend: of `indexer_divergence`.

    Returns:
        fp32 [documents], the loss of each document: mean over its rows, sum over the heads.
    """
    losses = torch.zeros(seen.num_documents, device=seen.queries.device)
    if not choice.rows.numel():
        return losses
    if seen.sinks is not None and backend == "auto":
        backend = "eager"  # kernels do not know learned sinks
    with torch.enable_grad():
        projected = seen.index_queries(choice.rows), seen.index_keys()
        # Gradients of the index states add up first, so that they go through the projections once.
        index_queries, index_keys = (states.detach().requires_grad_() for states in projected)
        for chunk in _chunks(seen, choice.rows, index_queries, backend):
            part = choice.part(chunk)
            divergence = indexer_divergence(
                seen.queries_of(part.rows)[0],
                seen.keys[0],
                seen.key_value_heads,
                index_queries[:, chunk],
                index_keys,
                part.rows,
                seen.starts,
                rule,
                scaling=seen.scaling,
                sinks=seen.sinks,
                backend=backend,
            )
            (divergence * part.weights).sum().backward()
            of_rows = (divergence.detach() * part.shares).sum(0).to(losses.dtype)
            losses.index_add_(0, part.documents, of_rows)
        gradients = [index_queries.grad, index_keys.grad]
        torch.autograd.backward(projected, gradients)
    return losses


def _chunks(
    seen: CapturedHeads, rows: Tensor, index_queries: Tensor, backend: str
) -> Iterator[slice]:
    """All rows for the kernels; for plain PyTorch so many at a time as bound the memory."""
    if divergence_backend(seen.queries, seen.keys, index_queries, backend) == "triton":
        return iter([slice(None)])
    return query_chunks(rows.numel(), len(seen.names) * seen.keys.shape[2])

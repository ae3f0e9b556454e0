"""Loss and gradients of stage 1 for some heads and queries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops.eager.visibility import query_chunks
from rtpurbo.ops.packed import divergence_backend, indexer_divergence
from rtpurbo.training.capture import CapturedHeads
from rtpurbo.training.packing import QueryChoice


def backpropagate(
    seen: CapturedHeads, choice: QueryChoice, rule: AttentionRule, *, backend: str = "auto"
) -> Tensor:
    """Computes the loss of stage 1 and adds its gradients to those of the indexers' weights.

    Args:
        seen: states of some heads over a packed sequence.
        choice: queries and the weights of their losses.
        rule: distribution that the selection applies to, sinks and window.
        backend: backend of `indexer_divergence`.

    Returns:
        fp32 [documents], loss of each document: mean over its queries, sum over the heads.
    """
    losses = torch.zeros(seen.num_documents, device=seen.queries.device)
    if not choice.positions.numel():
        return losses
    if seen.sinks is not None and backend == "auto":
        backend = "eager"  # kernels do not support learned sinks
    with torch.enable_grad():
        projected = seen.index_queries(choice.positions), seen.index_keys()
        # Gradients of the index states are summed first and pass through the projections once.
        index_queries, index_keys = (states.detach().requires_grad_() for states in projected)
        for chunk in _chunks(seen, choice.positions, index_queries, backend):
            part = choice.part(chunk)
            divergence = indexer_divergence(
                seen.queries_of(part.positions)[0],
                seen.keys[0],
                seen.key_value_heads,
                index_queries[:, chunk],
                index_keys,
                part.positions,
                seen.starts,
                rule,
                scaling=seen.scaling,
                sinks=seen.sinks,
                backend=backend,
            )
            (divergence * part.weights).sum().backward()
            per_query = (divergence.detach() * part.report_weights).sum(0).to(losses.dtype)
            losses.index_add_(0, part.documents, per_query)
        gradients = [index_queries.grad, index_keys.grad]
        torch.autograd.backward(projected, gradients)
    return losses


def _chunks(
    seen: CapturedHeads, positions: Tensor, index_queries: Tensor, backend: str
) -> Iterator[slice]:
    """Yields slices of the queries: one for the kernels, several for plain PyTorch to bound its memory."""
    if divergence_backend(seen.queries, seen.keys, index_queries, backend) == "triton":
        return iter([slice(None)])
    return query_chunks(positions.numel(), len(seen.names) * seen.keys.shape[2])

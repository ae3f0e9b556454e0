"""Loss of stage 1: forward KL between a head's attention and its indexer's distribution over the keys."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rtpurbo.config import AttentionRule
from rtpurbo.ops.eager.attend import attention_logits
from rtpurbo.ops.eager.selection import estimated_logits, index_scores
from rtpurbo.ops.eager.visibility import query_chunks
from rtpurbo.ops.sinks import with_sink_column


def forward_divergence(teacher_logits: Tensor, student_logits: Tensor, visible: Tensor) -> Tensor:
    """Forward KL of each query between two distributions over the visible keys (paper: Eq. 6), in nats.

    Logits are [batch, heads, queries, k_len]; those of the student receive gradients.

    Returns:
        [batch, heads, queries], at least 0.
    """
    teacher = teacher_logits.masked_fill(~visible, -torch.inf).log_softmax(-1)
    student = student_logits.masked_fill(~visible, -torch.inf).log_softmax(-1)
    difference = torch.where(visible, teacher - student, 0.0)
    return (teacher.exp() * difference).sum(-1)


def near_and_far(
    query_indices: Tensor, document_starts: Tensor, sliding_window: int, num_sink_tokens: int
) -> tuple[Tensor, Tensor]:
    """Masks of the near keys (sinks and window) and of the far keys of queries in packed documents.

    Args:
        query_indices: int64 [queries], indices of the queries in the packed sequence.
        document_starts: int64 [length], index of the first token of each token's document.
        sliding_window: W keys, including the query's own.
        num_sink_tokens: S, the first keys of the query's document.

    Returns:
        Two disjoint masks, bool [queries, length].
    """
    keys = torch.arange(document_starts.numel(), device=query_indices.device)
    queries, starts = query_indices[:, None], document_starts[query_indices][:, None]
    visible = (keys >= starts) & (keys <= queries)
    near = visible & ((keys > queries - sliding_window) | (keys < starts + num_sink_tokens))
    return near, visible & ~near


def indexer_divergence(
    query_states: Tensor,
    key_states: Tensor,
    key_value_heads: Tensor,
    index_queries: Tensor,
    index_keys: Tensor,
    query_indices: Tensor,
    document_starts: Tensor,
    rule: AttentionRule,
    *,
    scaling: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Forward KL between heads' causal attention and their indexers' estimate of it.

    A query attends to its own document, causally. The estimate is that of `estimated_logits`: in all readings but
    `paper`, near keys have their exact logits, so that only far keys contribute. Index queries and index keys
    receive gradients. Queries are processed in chunks that are recomputed in the backward pass: memory is
    linear in the length.

    Args:
        query_states: [heads, queries, head_dim], after RoPE.
        key_states: [key_value_heads, length, head_dim], after RoPE.
        key_value_heads: int64 [heads], KV head index of each head.
        index_queries: [heads, queries, index_dim].
        index_keys: [heads, length, index_dim].
        query_indices: int64 [queries], ascending indices of the queries in the packed sequence.
        document_starts: int64 [length], index of the first token of each token's document.
        rule: reading, sliding window and sinks.
        scaling: factor on the dot products of the states.
        sinks: learned sinks [heads], part of the near keys in both distributions.

    Returns:
        [heads, queries] in at least fp32, in nats.
    """
    keys = key_states[key_value_heads]

    def part(
        queries: Tensor, part_index_queries: Tensor, keys_of_index: Tensor, at: Tensor
    ) -> Tensor:
        near, far = near_and_far(at, document_starts, rule.near_window, rule.num_sink_tokens)
        exact = attention_logits(queries, keys, scaling)
        scores = index_scores(part_index_queries, keys_of_index)
        estimate = estimated_logits(rule.reading, exact, scores, near, far)
        whole = (exact[None], estimate[None], near[None, None], far[None, None])
        exact, estimate, near, far = with_sink_column(*whole, sinks)
        return forward_divergence(exact, estimate, near | far)[0]

    chunks = list(query_chunks(query_indices.numel(), len(keys) * keys.shape[1]))
    inputs = [
        (query_states[:, chunk], index_queries[:, chunk], index_keys, query_indices[chunk])
        for chunk in chunks
    ]
    if len(chunks) == 1:
        return part(*inputs[0])
    parts = [checkpoint(part, *values, use_reentrant=False) for values in inputs]
    return torch.cat(parts, -1) if parts else index_queries[..., 0] * 1.0

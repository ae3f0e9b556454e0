"""The loss of stage 1: how far an indexer's distribution over the keys is from its head's attention."""

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
    """Forward KL of each row between two distributions over the visible keys (paper: Eq. 6), in nats.

    Args:
        teacher_logits: [batch, heads, rows, k_len].
        student_logits: likewise; gradients flow here.
        visible: bool, broadcastable to them.

    Returns:
        [batch, heads, rows], at least 0.
    """
    teacher = teacher_logits.masked_fill(~visible, -torch.inf).log_softmax(-1)
    student = student_logits.masked_fill(~visible, -torch.inf).log_softmax(-1)
    difference = torch.where(visible, teacher - student, 0.0)
    return (teacher.exp() * difference).sum(-1)


def near_and_far(
    rows: Tensor, document_starts: Tensor, sliding_window: int, num_sink_tokens: int
) -> tuple[Tensor, Tensor]:
    """Sinks and window of rows within their documents, and what else they see.

    Args:
        rows: int64 [rows], places of the query rows in a sequence of packed documents.
        document_starts: int64 [length], for each token the place where its document begins.
        sliding_window: W keys, the row's own counted.
        num_sink_tokens: S, the first keys of the row's document.

    Returns:
        Two bool [rows, length] that share no key.
    """
    keys = torch.arange(document_starts.numel(), device=rows.device)
    queries, starts = rows[:, None], document_starts[rows][:, None]
    visible = (keys >= starts) & (keys <= queries)
    near = visible & ((keys > queries - sliding_window) | (keys < starts + num_sink_tokens))
    return near, visible & ~near


def indexer_divergence(
    query_states: Tensor,
    key_states: Tensor,
    key_value_heads: Tensor,
    index_queries: Tensor,
    index_keys: Tensor,
    rows: Tensor,
    document_starts: Tensor,
    rule: AttentionRule,
    *,
    scaling: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Forward KL between heads' causal attention and what their indexers estimate of it.

    A row sees its own document up to itself. The estimate is that of `estimated_logits`: in all readings but
    `paper`, sinks and window count with their exact logits, so that a row teaches only what lies far.
    Gradients flow to index queries and index keys. Many rows are walked over in chunks, which the
    backward pass computes again: memory grows with the length, not with its square.

    Args:
        query_states: [heads, rows, head_dim], after RoPE, of the rows given.
        key_states: [key_value_heads, length, head_dim], after RoPE.
        key_value_heads: int64 [heads], which of the key states each head reads.
        index_queries: [heads, rows, index_dim].
        index_keys: [heads, length, index_dim].
        rows: int64 [rows], ascending: places of the query rows in the sequence.
        document_starts: int64 [length], for each token the place where its document begins.
        rule: reading, sliding window and sinks.
        scaling: factor on the dot products of the states.
        sinks: learned sinks [heads], near keys of both distributions.

    Returns:
        [heads, rows] in at least fp32, in nats.
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

    chunks = list(query_chunks(rows.numel(), len(keys) * keys.shape[1]))
    inputs = [
        (query_states[:, chunk], index_queries[:, chunk], index_keys, rows[chunk])
        for chunk in chunks
    ]
    if len(chunks) == 1:
        return part(*inputs[0])
    parts = [checkpoint(part, *values, use_reentrant=False) for values in inputs]
    return torch.cat(parts, -1) if parts else index_queries[..., 0] * 1.0

"""Chunked output logits: top tokens, chosen logits and log-sum-exp without the full logits tensor.

The logits of all positions over the whole vocabulary would be by far the largest tensor in training
(128K tokens of Qwen3: 80 GB), and no result needs all of them at once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Positions times vocabulary entries of one chunk of logits: 128 MiB in fp32.
ROWS, COLUMNS = 4096, 8192


def chosen_logits(states: Tensor, head: nn.Module, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns logits of chosen tokens and the log-sum-exp of all; gradients flow to states and head.

    The logits of a chunk are computed again for its gradients.

    Args:
        states: [positions, hidden_size], the model's last hidden states.
        head: output embedding, a linear layer of [vocabulary, hidden_size].
        token_ids: int64 [positions, chosen].

    Returns:
        Logits [positions, chosen] and log-sum-exp [positions], in at least fp32.
    """

    def chosen(states: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = _logits(states, head)
        return logits.gather(-1, token_ids), logits.logsumexp(-1)

    size = _chunk_size(head)
    parts = [
        checkpoint(chosen, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(states.split(size), token_ids.split(size), strict=True)
    ]
    logits, totals = zip(*parts, strict=True)
    return torch.cat(logits), torch.cat(totals)


def log_probabilities(states: Tensor, head: nn.Module, token_ids: Tensor) -> Tensor:
    """Returns log-probabilities of chosen tokens; arguments and shape as in `chosen_logits`."""
    logits, log_sum_exp = chosen_logits(states, head, token_ids)
    return logits - log_sum_exp[:, None]


@torch.no_grad()
def most_likely(states: Tensor, head: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """Returns the most likely tokens.

    Args:
        states: [positions, hidden_size].
        head: output embedding, as in `chosen_logits`.
        count: number of tokens for each position.

    Returns:
        Token ids, int64 [positions, count], the most likely first, and their log-probabilities, in at
        least fp32.
    """
    token_ids, values = [], []
    for part in states.split(_chunk_size(head)):
        logits = _logits(part, head)
        best = logits.topk(count)
        token_ids.append(best.indices)
        values.append(best.values - logits.logsumexp(-1, keepdim=True))
    return torch.cat(token_ids), torch.cat(values)


def _chunk_size(head: nn.Module) -> int:
    return max(1, ROWS * COLUMNS // len(head.weight))  # type: ignore[arg-type]


def _logits(states: Tensor, head: nn.Module) -> Tensor:
    """Returns logits in at least fp32, after the rounding of the model's own precision."""
    logits: Tensor = head(states)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))

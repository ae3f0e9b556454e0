"""Chunked output logits: top tokens, chosen logits and log-sum-exp without the full logits tensor.

The logits of all positions over the whole vocabulary would be by far the largest tensor in training
(128K tokens of Qwen3: 80 GB), and no result needs all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Positions and vocabulary entries of one chunk of logits: 128 MiB in fp32.
ROWS, COLUMNS = 4096, 8192


def chosen_logits(states: Tensor, head: nn.Module, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns logits of chosen tokens and the log-sum-exp of all; gradients flow to states and head.

    Args:
        states: [positions, hidden_size], the model's last hidden states.
        head: output embedding, a linear layer of [vocabulary, hidden_size].
        token_ids: int64 [positions, chosen].

    Returns:
        Logits [positions, chosen] and log-sum-exp [positions], in at least fp32.
    """
    return _ChosenLogits.apply(_at_autocast_precision(states), *_parameters(head), token_ids)


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
    states = _at_autocast_precision(states)
    weight, bias = _parameters(head)
    kept_ids, kept, totals = [], [], []
    with torch.autocast(states.device.type, enabled=False):
        for rows in _slices(len(states), ROWS):
            best_ids = torch.empty(len(states[rows]), 0, dtype=torch.int64, device=states.device)
            best: Tensor | None = None
            total: Tensor | None = None
            for columns in _slices(len(weight), COLUMNS):
                logits = _logits(states[rows], weight, bias, columns)
                part = logits.logsumexp(-1)
                total = part if total is None else torch.logaddexp(total, part)
                found = logits.topk(min(count, logits.shape[-1]))
                values = found.values if best is None else torch.cat([best, found.values], -1)
                ids = torch.cat([best_ids, found.indices + columns.start], -1)
                best, places = values.topk(min(count, values.shape[-1]))
                best_ids = ids.gather(-1, places)
            assert best is not None
            assert total is not None
            kept_ids.append(best_ids)
            kept.append(best)
            totals.append(total)
    return torch.cat(kept_ids), torch.cat(kept) - torch.cat(totals)[:, None]


class _ChosenLogits(torch.autograd.Function):
    """Autograd function that saves only the log-sum-exp and recomputes the logits for the gradients."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Computes `chosen_logits`."""
        exact = torch.promote_types(states.dtype, torch.float32)
        chosen = torch.zeros(token_ids.shape, dtype=exact, device=states.device)
        total = torch.full(token_ids.shape[:1], -torch.inf, dtype=exact, device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            for columns in _slices(len(weight), COLUMNS):
                for rows in _slices(len(states), ROWS):
                    logits = _logits(states[rows], weight, bias, columns)
                    total[rows] = torch.logaddexp(total[rows], logits.logsumexp(-1))
                    places, inside = _places(token_ids[rows], columns)
                    chosen[rows] = torch.where(inside, logits.gather(-1, places), chosen[rows])
        ctx.save_for_backward(states, weight, bias, token_ids, total)
        return chosen, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Computes the gradients of states, weight and bias."""
        states, weight, bias, token_ids, total = ctx.saved_tensors
        of_chosen, of_total = gradients
        needed = ctx.needs_input_grad
        of_states = torch.zeros_like(states, dtype=total.dtype) if needed[0] else None
        of_weight = torch.empty_like(weight) if needed[1] else None
        of_bias = torch.empty_like(bias) if needed[2] else None
        for columns in _slices(len(weight), COLUMNS):
            # Sums over many positions need full precision.
            part_of_weight = None
            if of_weight is not None:
                part_of_weight = torch.zeros_like(weight[columns], dtype=total.dtype)
            part_of_bias = total.new_zeros(len(weight[columns]))
            for rows in _slices(len(states), ROWS):
                logits = _logits(states[rows], weight, bias, columns)
                gradient = logits.sub_(total[rows, None]).exp_().mul_(of_total[rows, None])
                places, inside = _places(token_ids[rows], columns)
                gradient.scatter_add_(-1, places, torch.where(inside, of_chosen[rows], 0.0))
                part_of_bias += gradient.sum(0) if of_bias is not None else 0
                gradient = gradient.to(states.dtype)
                if of_states is not None:
                    of_states[rows] += gradient @ weight[columns].to(states.dtype)
                if part_of_weight is not None:
                    part_of_weight += gradient.T @ states[rows]
            if of_weight is not None and part_of_weight is not None:
                of_weight[columns] = part_of_weight.to(weight.dtype)
            if of_bias is not None:
                of_bias[columns] = part_of_bias.to(bias.dtype)
        return None if of_states is None else of_states.to(states.dtype), of_weight, of_bias, None


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None, columns: slice) -> Tensor:
    """Returns logits [rows, columns] in at least fp32, after the rounding of the model's own precision."""
    part = None if bias is None else bias[columns].to(states.dtype)
    logits = nn.functional.linear(states, weight[columns].to(states.dtype), part)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _places(token_ids: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Returns the indices of tokens in a part of the vocabulary, and a mask of those in that part."""
    inside = (token_ids >= columns.start) & (token_ids < columns.stop)
    return (token_ids - columns.start).clamp(0, columns.stop - columns.start - 1), inside


def _slices(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _parameters(head: nn.Module) -> tuple[Tensor, Tensor | None]:
    return head.weight, getattr(head, "bias", None)  # type: ignore[return-value]


def _at_autocast_precision(states: Tensor) -> Tensor:
    device = states.device.type
    return (
        states.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else states
    )

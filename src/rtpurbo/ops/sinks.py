"""Learned attention sinks (gpt-oss): a logit per head in the denominator of the softmax, without a value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def with_sinks(output: Tensor, log_sum_exp: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Adds a learned sink to the denominator of every softmax.

    Args:
        output: [batch, heads, q_len, head_dim], attention without the sinks.
        log_sum_exp: [batch, heads, q_len], its natural log-sum-exp.
        sinks: [heads], logit of each head.

    Returns:
        Output and log-sum-exp with the sinks.
    """
    logits = sinks.to(log_sum_exp.dtype)[:, None]
    share = torch.sigmoid(log_sum_exp - logits)
    return output * share.unsqueeze(-1).to(output.dtype), torch.logaddexp(log_sum_exp, logits)


def with_sink_column(
    exact: Tensor, estimate: Tensor, near: Tensor, far: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prepends a learned sink to logits and masks: a near key with a known logit.

    Args:
        exact: attention logits [batch, heads, queries, k_len].
        estimate: estimated logits, same shape.
        near: bool, broadcastable to the logits.
        far: bool, broadcastable to the logits.
        sinks: [heads]; None returns the arguments unchanged.
    """
    if sinks is None:
        return exact, estimate, near, far
    column = sinks.to(exact.dtype)[None, :, None, None].expand_as(exact[..., :1])
    return (
        torch.cat([column, exact], -1),
        torch.cat([column, estimate], -1),
        F.pad(near, (1, 0), value=True),
        F.pad(far, (1, 0), value=False),
    )

"""Learned sinks (gpt-oss): a logit for each head that takes part in the softmax, and has no value."""

from __future__ import annotations

import torch
from torch import Tensor


def with_sinks(output: Tensor, log_sum_exp: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Adds a learned sink to the denominator of every softmax.

    Args:
        output: [batch, heads, q_len, head_dim], attention without the sinks.
        log_sum_exp: [batch, heads, q_len], its natural log-sum-exp.
        sinks: [heads], a logit for each head, which no value belongs to.

    Returns:
        Output and log-sum-exp of the attention with the sinks.
    """
    logits = sinks.to(log_sum_exp.dtype)[:, None]
    share = torch.sigmoid(log_sum_exp - logits)
    return output * share.unsqueeze(-1).to(output.dtype), torch.logaddexp(log_sum_exp, logits)

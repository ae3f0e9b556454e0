"""Record fields and correctness check that the benchmarks of both training stages share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.benchmarks.layer import dtype_name
from rtpurbo.benchmarks.timing import Measurement
from rtpurbo.config import AttentionRule, HeadMap

IMPLEMENTATIONS = ("rtpurbo", "eager")
RATIO = 0.15
# Largest relative errors of loss and gradient against plain PyTorch; half precision rounds both.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 0.01, 0.05


def facts(
    phase: str,
    geometry: str,
    model: PreTrainedModel,
    head_map: HeadMap,
    rule: AttentionRule,
    length: int,
) -> dict[str, Any]:
    """Record fields that are known before the measurement."""
    config = model.config
    return {
        "phase": phase,
        "context_length": length,
        "batch_size": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "num_retrieval_heads": head_map.num_retrieval_heads,
        "head_dim": config.head_dim,
        "sliding_window": rule.sliding_window,
        "density": 1.0,
        "dtype": dtype_name(model.dtype),
        "model": f"{geometry}, {config.num_hidden_layers} layers",
    }


def random_tokens(model: PreTrainedModel, length: int) -> Tensor:
    """Token ids int64 [length], the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (length,), generator=generator)


def take_gradient(weights: Sequence[Tensor], optimizer: torch.optim.Optimizer) -> Tensor:
    """Gradients of all weights in one vector; clears them."""
    gradient = torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])
    optimizer.zero_grad(set_to_none=True)
    return gradient


def complaint(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> str | None:
    """Difference of (losses, gradient) from plain PyTorch, or None if it is small enough."""
    (losses, gradient), (expected_losses, expected_gradient) = found, expected
    if not bool(losses.isfinite().all() and gradient.isfinite().all()):
        return "the loss or the gradient is not finite"
    loss_error = float(((losses - expected_losses).abs() / expected_losses.abs()).max())
    gradient_error = float((gradient - expected_gradient).norm() / expected_gradient.norm())
    if loss_error > LOSS_TOLERANCE:
        return f"the relative error of the loss is {loss_error:.2%}"
    if gradient_error > GRADIENT_TOLERANCE:
        return f"the relative error of the gradient is {gradient_error:.2%}"
    return None


def figures(length: int, found: Measurement) -> dict[str, Any]:
    """Record fields computed from the measurement."""
    peak = found.peak_memory_bytes
    return {
        "tokens_per_second": round(1000 * length / found.milliseconds, 1),
        "peak_memory_gib": None if peak is None else round(peak / 2**30, 2),
    }

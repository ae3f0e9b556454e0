"""Registry of the operators' backends: eager PyTorch, Triton kernels, FlexAttention."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rtpurbo.devices import has_triton

HALF = (torch.float16, torch.bfloat16)

# Module of each operator, by backend.
BACKENDS: dict[str, dict[str, str]] = {
    "eager": {
        "headwise_attention": "rtpurbo.ops.eager.headwise",
        "indexer_divergence": "rtpurbo.ops.eager.divergence",
    },
    "triton": {
        "headwise_attention": "rtpurbo.ops.triton.headwise",
        "indexer_divergence": "rtpurbo.ops.triton.training.divergence",
    },
    "flex": {"headwise_attention": "rtpurbo.ops.flex.headwise"},
}


def implementation(operator: str, backend: str) -> Any:
    """The function of an operator in a backend; `auto` is `eager` here.

    Raises:
        ValueError: the backend is unknown or lacks the operator.
    """
    chosen = "eager" if backend == "auto" else backend
    if chosen not in BACKENDS:
        raise ValueError(
            f"backend '{backend}' is unknown: choose 'auto' or one of {sorted(BACKENDS)}."
        )
    if operator not in BACKENDS[chosen]:
        raise ValueError(f"backend '{chosen}' has no operator '{operator}': choose 'eager'.")
    return getattr(import_module(BACKENDS[chosen][operator]), operator)


def unsupported_reason(operator: str, backend: str, *arguments: Any) -> str | None:
    """First reason for which a backend cannot run a call; None if it can."""
    module = import_module(BACKENDS[backend][operator])
    return next(module.unsupported_reasons(*arguments), None)


def interprets_kernels() -> bool:
    """Returns True if Triton interprets its kernels on the CPU (TRITON_INTERPRET, as Triton parses it)."""
    if not has_triton():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def require_triton(states: Tensor) -> None:
    """Checks that Triton kernels can run on the device of `states`.

    Raises:
        ValueError: Triton is not installed, or there is neither a GPU nor the interpreter.
    """
    if not has_triton():
        raise ValueError("backend 'triton' needs the package triton: pip install triton.")
    if not states.is_cuda and not interprets_kernels():
        raise ValueError("backend 'triton' needs a GPU: move the model there, or choose 'eager'.")

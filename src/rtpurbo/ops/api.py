"""Public attention operators: argument checks, backends and their choice, dispatch.

Shapes and semantics are documented in the specification, `rtpurbo.ops.eager`; all backends compute the same.
A backend given by name is used or raises. `auto` uses the Triton kernels for half precision on a GPU where they
support the call, FlexAttention for gradients of long sequences on a GPU, and `eager` otherwise.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.devices import has_triton
from rtpurbo.ops.eager.headwise import with_dense_queries
from rtpurbo.ops.states import (
    AttentionCall,
    HeadLayout,
    KeyValueStates,
    SelectionStatistics,
    Selector,
    check_states,
)

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


def chosen_backend(backend: str, call: AttentionCall) -> str:
    """Backend that `headwise_attention` uses for a call.

    Raises:
        ValueError: the backend given by name does not support the call.
    """
    statistics = call.statistics
    watched = call.selector is not None or (statistics is not None and statistics.needs_queries)
    if watched and call.index_queries is not None:
        if backend in ("triton", "flex"):
            raise ValueError(
                "the kernels select by the rule only and expose no logits: choose backend 'eager' for "
                "a selector, or for statistics that need the queries."
            )
        return "eager"
    if backend == "auto":
        return _best_backend(call)
    if backend not in ("triton", "flex"):
        return backend
    if backend == "triton":
        require_triton(call.query_states)
    reason = _unsupported(backend, call)
    if reason is not None:
        raise ValueError(
            f"backend '{backend}' does not support this call: {reason}. Choose backend 'eager'."
        )
    return backend


def _best_backend(call: AttentionCall) -> str:
    """Fastest backend that supports a call."""
    if not (call.query_states.is_cuda and has_triton()):
        return "eager"
    if call.query_states.dtype in HALF and _unsupported("triton", call) is None:
        return "triton"
    from rtpurbo.ops.flex.headwise import is_profitable

    if is_profitable(call) and _unsupported("flex", call) is None:
        return "flex"
    return "eager"


def _unsupported(backend: str, call: AttentionCall) -> str | None:
    """Reason for which a backend cannot run a call of `headwise_attention`; None if it can."""
    selects = call.index_queries is not None
    if call.sinks is not None and selects and (backend == "flex" or call.rule.reading == "paper"):
        return "learned sinks take part in the selection"
    return unsupported_reason("headwise_attention", backend, call)


def headwise_attention(
    query_states: Tensor,
    query_positions: Tensor,
    full: KeyValueStates,
    windowed: KeyValueStates,
    layout: HeadLayout,
    index_queries: Tensor | None,
    rule: AttentionRule,
    *,
    scaling: float,
    statistics: SelectionStatistics | None = None,
    return_log_sum_exp: bool = False,
    selector: Selector | None = None,
    sinks: Tensor | None = None,
    dense_queries: slice | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Attention of a whole layer; arguments as in `rtpurbo.ops.states.AttentionCall`.

    Returns:
        Output [batch, num_attention_heads, q_len, head_dim] and the log-sum-exp
        [batch, num_attention_heads, q_len] or None.
    """
    check_states(query_states, query_positions, full)
    check_states(query_states, query_positions, windowed)
    call = AttentionCall(
        query_states, query_positions, full, windowed, layout, index_queries, rule, scaling,
        statistics=statistics, return_log_sum_exp=return_log_sum_exp, selector=selector,
        sinks=sinks, dense_queries=dense_queries,
    )  # fmt: skip
    return attend_with(chosen_backend(backend, call), call)


def attend_with(backend: str, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """`headwise_attention` with a backend from `chosen_backend`."""
    dtype = call.query_states.dtype
    is_mixed = dtype != call.full.keys.dtype
    if is_mixed:  # under autocast, queries and cache may differ in dtype
        call = replace(call, query_states=call.query_states.to(call.full.keys.dtype))
    dense_separately = call.dense_queries is not None
    if dense_separately and backend == "triton":
        from rtpurbo.ops.triton.headwise import supports_dense_queries

        dense_separately = not supports_dense_queries(call)
    output, log_sum_exp = implementation("headwise_attention", backend)(
        replace(call, dense_queries=None) if dense_separately else call
    )
    if dense_separately:
        output, log_sum_exp = with_dense_queries(output, log_sum_exp, call)
    return output.to(dtype) if is_mixed else output, log_sum_exp


def new_histogram_workspace(
    batch: int, num_retrieval_heads: int, device: torch.device
) -> Tensor | None:
    """Histogram workspace of the decode kernels for a batch of sequences, kept from step to step.

    Returns:
        Zeros for `KeyValueStates.histogram_workspace`, not to be shared by concurrent steps; None on devices
        without the kernels.
    """
    if device.type != "cuda" or not has_triton():
        return None
    from rtpurbo.ops.triton.decode.workspace import zero_histograms

    return zero_histograms(batch * num_retrieval_heads, device)

"""The public operators: check, choose a backend, call it. A backend named is used, or refuses.

Shapes and meaning are documented at the specification, `rtpurbo.ops.eager`; every backend computes
the same. `auto` takes kernels for half precision on a GPU wherever they can serve the call, and
FlexAttention for the gradients of long sequences there.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.devices import has_triton
from rtpurbo.ops.eager.selection import index_scores
from rtpurbo.ops.sinks import with_sinks
from rtpurbo.ops.states import HeadLayout, KeyValueStates, SelectionStatistics, Selector

__all__ = [
    "attend_by",
    "causal_attention",
    "chosen_backend",
    "decoding_counters",
    "headwise_attention",
    "index_scores",
    "local_attention",
    "retrieval_attention",
]

HALF = (torch.float16, torch.bfloat16)

# Where each backend keeps each operator.
BACKENDS: dict[str, dict[str, str]] = {
    "eager": {
        "local_attention": "rtpurbo.ops.eager.local",
        "causal_attention": "rtpurbo.ops.eager.local",
        "retrieval_attention": "rtpurbo.ops.eager.retrieval",
        "headwise_attention": "rtpurbo.ops.eager.headwise",
        "packed_attention": "rtpurbo.ops.eager.packed",
        "indexer_divergence": "rtpurbo.ops.eager.divergence",
    },
    "triton": {
        "headwise_attention": "rtpurbo.ops.triton.headwise",
        "packed_attention": "rtpurbo.ops.triton.packed",
        "indexer_divergence": "rtpurbo.ops.triton.training.divergence",
    },
    "flex": {"headwise_attention": "rtpurbo.ops.flex.headwise"},
}


def _implementation(operator: str, backend: str) -> Any:
    chosen = "eager" if backend == "auto" else backend
    if chosen not in BACKENDS:
        raise ValueError(
            f"backend '{backend}' is unknown: choose 'auto' or one of {sorted(BACKENDS)}."
        )
    if operator not in BACKENDS[chosen]:
        raise ValueError(f"backend '{chosen}' has no operator '{operator}': choose 'eager'.")
    return getattr(import_module(BACKENDS[chosen][operator]), operator)


def chosen_backend(
    backend: str,
    query_states: Tensor,
    full: KeyValueStates,
    bounded: KeyValueStates,
    index_queries: Tensor | None,
    rule: AttentionRule,
    statistics: SelectionStatistics | None = None,
    selector: Selector | None = None,
    sinks: Tensor | None = None,
) -> str:
    """The backend that `headwise_attention` will use for such a call.

    Raises:
        ValueError: the backend named cannot serve the call.
    """
    watched = selector is not None or (statistics is not None and statistics.needs_rows)
    if watched and index_queries is not None:
        if backend in ("triton", "flex"):
            raise ValueError(
                "the kernels select by the rule alone and show no rows: choose backend 'eager' for "
                "a selector, or for statistics of rows."
            )
        return "eager"
    call = (query_states, full, bounded, index_queries, rule)
    if backend == "auto":
        return _best_backend(sinks, *call)
    if backend not in ("triton", "flex"):
        return backend
    if backend == "triton":
        if not has_triton():
            raise ValueError("backend 'triton' needs the package triton: pip install triton.")
        if not query_states.is_cuda and not os.environ.get("TRITON_INTERPRET"):
            raise ValueError(
                "backend 'triton' needs a GPU: move the model there, or choose 'eager'."
            )
    reason = _refusal(backend, sinks, *call)
    if reason is not None:
        raise ValueError(f"the kernels cannot serve this call: {reason}. Choose backend 'eager'.")
    return backend


def _best_backend(sinks: Tensor | None, query_states: Tensor, *others: Any) -> str:
    """The fastest backend that can serve a call."""
    if not (query_states.is_cuda and has_triton()):
        return "eager"
    call = (sinks, query_states, *others)
    if query_states.dtype in HALF and _refusal("triton", *call) is None:
        return "triton"
    from rtpurbo.ops.flex.headwise import pays

    if pays(query_states, *others[:2]) and _refusal("flex", *call) is None:
        return "flex"
    return "eager"


def _refusal(backend: str, sinks: Tensor | None, *call: Any) -> str | None:
    """Why a backend's kernels cannot serve a call of `headwise_attention`; None if they can."""
    *_, index_queries, rule = call
    selects = index_queries is not None
    if sinks is not None and selects and (backend == "flex" or rule.reading == "paper"):
        return "learned sinks take part in the selection"
    kernels = import_module(BACKENDS[backend]["headwise_attention"])
    return next(kernels.refusals(*call), None)


def _check_states(query_states: Tensor, query_positions: Tensor, states: KeyValueStates) -> None:
    batch, _, q_len, head_dim = query_states.shape
    if query_positions.shape != (batch, q_len):
        raise ValueError(
            f"query_positions are {tuple(query_positions.shape)}, but must be {(batch, q_len)}."
        )
    if states.keys.shape[0] != batch or states.keys.shape[-1] != head_dim:
        raise ValueError(
            f"keys {tuple(states.keys.shape)} do not fit queries {tuple(query_states.shape)}: "
            "batch and head_dim must be equal."
        )
    if states.positions.shape != (batch, states.keys.shape[2]):
        raise ValueError(
            f"key positions are {tuple(states.positions.shape)}, "
            f"but must be {(batch, states.keys.shape[2])}."
        )


def local_attention(
    query_states: Tensor,
    query_positions: Tensor,
    states: KeyValueStates,
    key_value_heads: Tensor,
    *,
    backend: str = "auto",
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Sinks and window: `rtpurbo.ops.eager.local.local_attention`."""
    _check_states(query_states, query_positions, states)
    operator = _implementation("local_attention", backend)
    return operator(query_states, query_positions, states, key_value_heads, **options)


def causal_attention(
    query_states: Tensor,
    query_positions: Tensor,
    states: KeyValueStates,
    key_value_heads: Tensor,
    *,
    backend: str = "auto",
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Dense heads: `rtpurbo.ops.eager.local.causal_attention`."""
    _check_states(query_states, query_positions, states)
    operator = _implementation("causal_attention", backend)
    return operator(query_states, query_positions, states, key_value_heads, **options)


def retrieval_attention(
    query_states: Tensor,
    query_positions: Tensor,
    states: KeyValueStates,
    key_value_heads: Tensor,
    index_queries: Tensor,
    rule: AttentionRule,
    *,
    backend: str = "auto",
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Near keys and selected far ones: `rtpurbo.ops.eager.retrieval.retrieval_attention`."""
    _check_states(query_states, query_positions, states)
    operator = _implementation("retrieval_attention", backend)
    return operator(
        query_states, query_positions, states, key_value_heads, index_queries, rule, **options
    )


def headwise_attention(
    query_states: Tensor,
    query_positions: Tensor,
    full: KeyValueStates,
    bounded: KeyValueStates,
    layout: HeadLayout,
    index_queries: Tensor | None,
    rule: AttentionRule,
    *,
    scaling: float,
    statistics: SelectionStatistics | None = None,
    return_log_sum_exp: bool = False,
    selector: Selector | None = None,
    sinks: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """A whole layer: `rtpurbo.ops.eager.headwise.headwise_attention`."""
    _check_states(query_states, query_positions, full)
    _check_states(query_states, query_positions, bounded)
    backend = chosen_backend(
        backend, query_states, full, bounded, index_queries, rule, statistics, selector, sinks
    )
    return attend_by(
        backend,
        query_states,
        query_positions,
        full,
        bounded,
        layout,
        index_queries,
        rule,
        scaling=scaling,
        statistics=statistics,
        return_log_sum_exp=return_log_sum_exp,
        selector=selector,
        sinks=sinks,
    )


def attend_by(
    backend: str,
    query_states: Tensor,
    query_positions: Tensor,
    full: KeyValueStates,
    *others: Any,
    return_log_sum_exp: bool = False,
    selector: Selector | None = None,
    sinks: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`headwise_attention` by the backend that `chosen_backend` has chosen for the call."""
    knows_sinks = backend in ("eager", "triton")
    if knows_sinks:
        options["sinks"] = sinks
    if backend == "eager":
        options["selector"] = selector
    # A cache may have been filled under autocast and be read without it, or the reverse.
    queries = query_states.to(full.keys.dtype)
    output, log_sum_exp = _implementation("headwise_attention", backend)(
        queries,
        query_positions,
        full,
        *others,
        return_log_sum_exp=return_log_sum_exp or not (knows_sinks or sinks is None),
        **options,
    )
    if sinks is not None and not knows_sinks:
        output, log_sum_exp = with_sinks(output, log_sum_exp, sinks)
    if queries.dtype != query_states.dtype:
        output = output.to(query_states.dtype)
    return output, log_sum_exp if return_log_sum_exp else None


def decoding_counters(batch: int, num_retrieval_heads: int, device: torch.device) -> Tensor | None:
    """Histogram workspace of the decode kernels, to be kept from step to step.

    Args:
        batch: sequences.
        num_retrieval_heads: of the layer.
        device: where the cache is.

    Returns:
        Zeros, to be handed over as `KeyValueStates.counters`, and not to two steps at once; None
        where no kernels run.
    """
    if device.type != "cuda" or not has_triton():
        return None
    from rtpurbo.ops.triton.decode.launch import new_counters

    return new_counters(batch * num_retrieval_heads, device)

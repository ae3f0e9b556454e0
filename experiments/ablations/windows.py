"""A window for every local head: what windows of several sizes cost it, who gets which, and running so.

Sizes are dealt out by what they cost on calibration texts, under a mean that is the same for all
ways to count the cost. `output_error` is the change of what the head adds to the residual stream,
relative to that stream; `lost_mass` the attention mass beyond sinks and window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.config import HeadMap, RTPurboConfig
from rtpurbo.models.sparse_layer import SparseAttention
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import empty_head_map, restore, runtime, sparsify
from rtpurbo.ops import HeadLayout, KeyValueStates, headwise_attention, local_attention
from rtpurbo.ops.eager.attend import attend_to_logits, attention_logits
from rtpurbo.ops.eager.visibility import causal_mask, near_mask

ROWS = 128
SMALLEST = 64
Costs = dict[str, list[list[list[float]] | None]]
"""By the way to count: for each layer and head, the cost of each window of the ladder."""


def ladder(length: int) -> list[int]:
    """The windows to choose from: powers of two up to the whole length."""
    sizes = [SMALLEST]
    while sizes[-1] < length:
        sizes.append(2 * sizes[-1])
    return sizes


@torch.no_grad()
def window_costs(
    model: PreTrainedModel,
    sequences: Sequence[list[int]],
    windows: Sequence[int],
    num_sink_tokens: int,
) -> Costs:
    """What every window costs every head, mean over rows of the second half of some sequences.

    Args:
        model: dense, with separate projections (`o_proj`), and left so.
        sequences: prose.
        windows: the ladder.
        num_sink_tokens: seen beside any window.
    """
    sums: dict[int, dict[str, Tensor]] = {}
    residuals: dict[int, Tensor] = {}

    def measure(module: SparseAttention, attend: Callable[..., Tensor], *call: Any) -> Tensor:
        queries, positions, states, _ = call
        costs = _costs_of(module, queries, positions, states, windows, num_sink_tokens)
        scale = residuals[module.layer_idx].float().square().sum(-1).mean()
        found = {"output_error": costs["output_error"] / scale, "lost_mass": costs["lost_mass"]}
        before = sums.get(module.layer_idx)
        sums[module.layer_idx] = {
            name: cost + (0 if before is None else before[name]) for name, cost in found.items()
        }
        return attend(*call)

    sparsify(model, RTPurboConfig(empty_head_map(model)))
    hooks = []
    for module in headwise_modules(model):
        layer = model.base_model.layers[module.layer_idx]

        def keep(_: Any, inputs: Any, number: int = module.layer_idx) -> None:
            residuals[number] = inputs[0]

        hooks.append(layer.register_forward_pre_hook(keep))
        attend = module._attend_densely
        module._attend_densely = (  # type: ignore[method-assign]
            lambda *call, module=module, attend=attend: measure(module, attend, *call)
        )
    try:
        with runtime(model).dense():
            for sequence in sequences:
                model.base_model(torch.tensor([sequence], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        restore(model)
    return {
        name: [
            (sums[layer][name] / len(sequences)).tolist() if layer in sums else None
            for layer in range(model.config.num_hidden_layers)
        ]
        for name in ("output_error", "lost_mass")
    }


def _costs_of(
    module: SparseAttention,
    queries: Tensor,
    positions: Tensor,
    states: KeyValueStates,
    windows: Sequence[int],
    num_sink_tokens: int,
) -> dict[str, Tensor]:
    """Costs [heads, windows] of one sequence; those of the output are in squares of its units."""
    length, group = queries.shape[2], queries.shape[1] // states.keys.shape[1]
    rows = torch.linspace(length // 2, length - 1, ROWS, device=queries.device).long()
    own = positions[:, rows]
    keys, values = (part.repeat_interleave(group, 1) for part in (states.keys, states.values))
    logits = attention_logits(queries[:, :, rows], keys, module.scaling)
    visible = causal_mask(own, states.positions)
    whole, total = attend_to_logits(logits, values, visible)
    # [heads, head_dim, hidden_size]: what each head's output is turned into.
    mixing = (
        module.module.get_parameter("o_proj.weight")
        .T.unflatten(0, (queries.shape[1], -1))
        .to(whole.dtype)
    )
    errors, lost = [], []
    for window in windows:
        near = near_mask(own, states.positions, window, num_sink_tokens)
        part, kept = attend_to_logits(logits, values, near)
        change = ((part - whole)[0] @ mixing).float()
        errors.append(change.square().sum(-1).mean(-1))
        lost.append(1 - (kept - total).exp()[0].mean(-1))
    return {"output_error": torch.stack(errors, -1), "lost_mass": torch.stack(lost, -1)}


def dealt_windows(
    costs: Sequence[Sequence[Sequence[float]] | None],
    head_map: HeadMap,
    windows: Sequence[int],
    mean: int,
) -> list[list[int] | None]:
    """The window of every head, of which the mean over local heads is at most `mean`.

    From the smallest window on, the head is widened that gains most a token, to the size at which it
    does, as long as there are tokens left.

    Args:
        costs: for each layer and head, the cost of each window.
        head_map: its retrieval heads get the mean, which is not counted.
        windows: ascending.
        mean: in tokens.
    """
    local = [
        (layer, head)
        for layer, heads in enumerate(head_map.retrieval_heads)
        if heads is not None
        for head in range(head_map.num_query_heads(layer))
        if head not in heads
    ]
    sizes = torch.tensor(windows, dtype=torch.float64)
    cost = torch.tensor([costs[layer][head] for layer, head in local], dtype=torch.float64)  # type: ignore[index]
    at = torch.zeros(len(local), dtype=torch.int64)
    left = float(mean * len(local) - len(local) * windows[0])
    while True:
        more = sizes[None] - sizes[at][:, None]
        gain = (cost.gather(1, at[:, None]) - cost) / more
        gain = gain.masked_fill((more <= 0) | (more > left), 0.0)
        place = int(gain.argmax())
        head, size = divmod(place, len(windows))
        if gain[head, size] <= 0:
            break
        left -= float(more[head, size])
        at[head] = size
    dealt: list[list[int] | None] = [
        None if heads is None else [mean] * head_map.num_query_heads(layer)
        for layer, heads in enumerate(head_map.retrieval_heads)
    ]
    for (layer, head), size in zip(local, at.tolist(), strict=True):
        dealt[layer][head] = windows[size]  # type: ignore[index]
    return dealt


def use_windows(model: PreTrainedModel, windows: Sequence[Sequence[int] | None]) -> None:
    """Gives every local head its window, until the model is made sparse anew; without a cache alone.

    Args:
        model: sparse.
        windows: for each layer, a window a head.
    """
    for module in headwise_modules(model):
        sizes = torch.tensor(windows[module.layer_idx], device=model.device)
        module.attend = (  # type: ignore[method-assign]
            lambda *call, module=module, sizes=sizes: _attend(module, sizes, *call)
        )


def _attend(
    module: SparseAttention,
    windows: Tensor,
    query_positions: Tensor,
    queries: Tensor,
    index_queries: Tensor | None,
    full: KeyValueStates,
    bounded: KeyValueStates,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `SparseAttention.attend`, with a window a head."""
    layout, parts = module.layout(queries.device), []
    if len(layout.retrieval):
        retrieving, _ = headwise_attention(
            queries, query_positions, full, bounded, _without_local(layout), index_queries,
            module.rule, scaling=module.scaling, statistics=module.statistics,
            selector=module.selector, backend="eager",
        )  # fmt: skip
        parts.append(retrieving)
    for group, states in ((layout.local_full, full), (layout.local_windowed, bounded)):
        if len(group):
            output, _ = local_attention(
                queries[:, group.heads],
                query_positions,
                states,
                group.key_value_heads,
                sliding_window=windows[group.heads],
                num_sink_tokens=module.rule.num_sink_tokens,
                scaling=module.scaling,
                backend="eager",
            )
            parts.append(output)
    return torch.cat(parts, 1)[:, layout.order]


def _without_local(layout: HeadLayout) -> HeadLayout:
    none = replace(
        layout.local_full,
        heads=layout.local_full.heads[:0],
        key_value_heads=layout.local_full.key_value_heads[:0],
    )
    order = torch.arange(len(layout.retrieval), device=layout.order.device)
    return replace(layout, local_full=none, local_windowed=none, order=order, derived={})

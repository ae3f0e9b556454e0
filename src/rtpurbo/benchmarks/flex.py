"""FlexAttention with the mask of head-wise attention: dense retrieval heads, windows for the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rtpurbo.benchmarks.layer import LayerShape, LayerStates
from rtpurbo.benchmarks.timing import Call
from rtpurbo.config import AttentionRule


def flex_attention(
    shape: LayerShape, rule: AttentionRule, states: LayerStates, device: torch.device
) -> Call:
    """Call of the compiled operator; its block mask is created here, outside of the timing."""
    from torch.nn.attention import flex_attention as flex

    retrieves = torch.zeros(shape.num_attention_heads, dtype=torch.bool, device=device)
    retrieves[list(shape.retrieval_heads)] = True
    sinks, window = rule.num_sink_tokens, rule.sliding_window

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_near = (key < sinks) | (query - key < window)
        return (query >= key) & (retrieves[head] | is_near)

    make: Any = flex.create_block_mask
    attend: Any = flex.flex_attention
    if device.type == "cuda":
        # Compiled, so that the whole mask is never materialised.
        make, attend = (torch.compile(function, dynamic=False) for function in (make, attend))
    blocks = make(
        mask, None, shape.num_attention_heads, states.length, states.length, device=str(device)
    )
    return lambda: attend(
        states.queries,
        states.keys,
        states.values,
        block_mask=blocks,
        scale=states.scaling,
        enable_gqa=True,
    )

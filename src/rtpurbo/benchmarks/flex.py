"""FlexAttention with the mask of our heads: dense retrieval heads, windows for the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rtpurbo.benchmarks.timing import Call

if TYPE_CHECKING:
    from rtpurbo.benchmarks.prefill import PrefillCase


def flex_attention(case: PrefillCase, device: torch.device) -> Call:
    """The compiled operator; its mask by blocks is made here, outside of the timing."""
    from torch.nn.attention import flex_attention as flex

    retrieves = torch.zeros(case.shape.num_attention_heads, dtype=torch.bool, device=device)
    retrieves[list(case.shape.retrieval_heads)] = True
    sinks, window = case.rule.num_sink_tokens, case.rule.sliding_window

    def mask(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        is_near = (column < sinks) | (row - column < window)
        return (row >= column) & (retrieves[head] | is_near)

    make: Any = flex.create_block_mask
    attend: Any = flex.flex_attention
    if device.type == "cuda":
        # Compiled, the mask is made without ever holding all of its entries.
        make, attend = (torch.compile(function, dynamic=False) for function in (make, attend))
    blocks = make(
        mask, None, case.shape.num_attention_heads, case.length, case.length, device=str(device)
    )
    states = case.states
    return lambda: attend(
        states.queries,
        states.keys,
        states.values,
        block_mask=blocks,
        scale=states.scaling,
        enable_gqa=True,
    )

"""Attention operators on torch tensors: `rtpurbo.ops.api` is the interface, `eager` the specification."""

from rtpurbo.ops.api import (
    causal_attention,
    headwise_attention,
    index_scores,
    local_attention,
    new_histogram_workspace,
    retrieval_attention,
)
from rtpurbo.ops.sinks import with_sinks
from rtpurbo.ops.states import (
    HeadGroup,
    HeadLayout,
    KeyValueStates,
    SelectionQueries,
    SelectionStatistics,
    Selector,
)

__all__ = [
    "HeadGroup",
    "HeadLayout",
    "KeyValueStates",
    "SelectionQueries",
    "SelectionStatistics",
    "Selector",
    "causal_attention",
    "headwise_attention",
    "index_scores",
    "local_attention",
    "new_histogram_workspace",
    "retrieval_attention",
    "with_sinks",
]

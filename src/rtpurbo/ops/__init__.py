"""Attention operators on torch tensors: `rtpurbo.ops.api` is the interface, `eager` the specification."""

from rtpurbo.ops.api import headwise_attention, new_histogram_workspace
from rtpurbo.ops.eager.local import causal_attention, local_attention
from rtpurbo.ops.eager.retrieval import retrieval_attention
from rtpurbo.ops.eager.selection import index_scores
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
]

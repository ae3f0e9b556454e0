"""The operators: torch in, torch out. `rtpurbo.ops.api` is the door, `eager` the specification."""

from rtpurbo.ops.api import (
    causal_attention,
    decoding_counters,
    headwise_attention,
    index_scores,
    local_attention,
    retrieval_attention,
)
from rtpurbo.ops.sinks import with_sinks
from rtpurbo.ops.states import (
    HeadGroup,
    HeadLayout,
    KeyValueStates,
    SelectionRows,
    SelectionStatistics,
    Selector,
)

__all__ = [
    "HeadGroup",
    "HeadLayout",
    "KeyValueStates",
    "SelectionRows",
    "SelectionStatistics",
    "Selector",
    "causal_attention",
    "decoding_counters",
    "headwise_attention",
    "index_scores",
    "local_attention",
    "retrieval_attention",
    "with_sinks",
]

"""An index of half the bytes."""

from __future__ import annotations

from rtpurbo.evaluation.policies.policy import RulePolicy

POLICY = RulePolicy(
    "rtpurbo-float8-index",
    "the same, with index keys kept in float8",
    place=14,
    changes={"index_storage": "float8"},
)

"""The model before stage 2: the indexers of stage 1 on the dense model's weights."""

from __future__ import annotations

from rtpurbo.evaluation.policies.policy import RulePolicy

POLICY = RulePolicy(
    "rtpurbo-before-stage2",
    "the sparse model with the weights of the dense one",
    place=15,
    stage2=False,
)

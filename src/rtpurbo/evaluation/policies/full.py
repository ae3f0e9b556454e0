"""The dense model: what all others are measured against."""

from __future__ import annotations

from rtpurbo.evaluation.policies.policy import DENSE_POLICY, Policy
from rtpurbo.evaluation.policies.source import Loaded, Source


class Full(Policy):
    """Every head of the base model reads everything."""

    def prepare(self, source: Source) -> Loaded:
        """Makes the model."""
        return source.dense()


POLICY = Full(DENSE_POLICY, "the dense model before conversion", place=0)

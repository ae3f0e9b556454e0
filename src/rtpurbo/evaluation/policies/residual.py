"""Top-p of what the near keys leave."""

from __future__ import annotations

from rtpurbo.evaluation.policies.policy import RulePolicy

# Near keys count with their exact mass, far ones by the indexer; the artifact's floor stays.
POLICY = RulePolicy(
    "rtpurbo-residual",
    "the same with the reading `residual`: far tokens are added to the near mass",
    place=12,
    changes={"reading": "residual"},
)

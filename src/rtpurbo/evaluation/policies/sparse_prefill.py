"""Selection in the prompt too."""

from __future__ import annotations

from rtpurbo.evaluation.policies.policy import RulePolicy

POLICY = RulePolicy(
    "rtpurbo-sparse-prefill",
    "the same, selecting in the prompt too: one block list for a tile of rows",
    place=13,
    changes={"prefill_mode": "row_share"},
)

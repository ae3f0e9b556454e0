"""The artifact as it is."""

from __future__ import annotations

from rtpurbo.evaluation.policies.policy import BUDGET_POLICY, RulePolicy

POLICY = RulePolicy(BUDGET_POLICY, "the sparse model, as the artifact has it", place=10)

"""Policies to compare, in display order."""

from __future__ import annotations

from rtpurbo.evaluation.policies import oracle_top_p, quest, random_heads, top_k, variants
from rtpurbo.evaluation.policies.policy import BUDGET_POLICY, DENSE_POLICY, BudgetPolicy, Policy
from rtpurbo.evaluation.policies.source import Loaded, Source

__all__ = [
    "BUDGET_POLICY",
    "DENSE_POLICY",
    "POLICIES",
    "BudgetPolicy",
    "Loaded",
    "Policy",
    "Source",
]

POLICIES: dict[str, Policy] = {
    policy.name: policy
    for policy in (
        *variants.VARIANTS,
        quest.POLICY,
        top_k.POLICY,
        oracle_top_p.POLICY,
        variants.LOCAL_ONLY,
        random_heads.POLICY,
    )
}
"""Every policy by name, in display order."""

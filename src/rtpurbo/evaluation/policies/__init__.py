"""Policies to compare. A new policy is a new file that defines `POLICY`, or an entry of `POLICIES` in one."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

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


def _find_policies() -> dict[str, Policy]:
    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    found = [module.POLICY for module in modules if hasattr(module, "POLICY")]
    found += [policy for module in modules for policy in getattr(module, "POLICIES", ())]
    return {policy.name: policy for policy in sorted(found, key=lambda policy: policy.place)}


POLICIES: dict[str, Policy] = _find_policies()
"""Every policy by name, in display order."""

"""Budgets of far tokens: the mean number that `rtpurbo` read in the same cases."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rtpurbo.evaluation.cases import HARNESS, Case
from rtpurbo.evaluation.policies import POLICIES, BudgetPolicy
from rtpurbo.evaluation.records import Record


def has_budget(policy: str) -> bool:
    """Returns True if a policy needs a budget of far tokens."""
    return isinstance(POLICIES[policy], BudgetPolicy)


def budget_of(policy: str, case: Case, records: Iterable[Record]) -> int | None:
    """Returns the far tokens per query that a policy may read in a case; None if it has no budget."""
    return far_token_budget(case, records) if has_budget(policy) else None


def far_token_budget(case: Case, records: Iterable[Record]) -> int:
    """Returns the far tokens that a query may read: the mean over queries of some records, rounded up.

    Records are of the policy that sets budgets, one per case; those of the suite at the length of the case
    count. Tasks of lm-eval have only the model's context in common, so each has its own budget. Without any
    query that has far tokens, it is 0.
    """
    far_tokens, queries = 0.0, 0
    for record in records:
        same = (record.suite, record.context_length) == (case.suite, case.context_length)
        if same and (case.suite != HARNESS or record.task == case.task) and record.far_rows:
            assert record.far_tokens_mean is not None
            far_tokens += record.far_tokens_mean * record.far_rows
            queries += record.far_rows
    return math.ceil(far_tokens / queries) if queries else 0

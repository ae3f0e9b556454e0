"""Budgets of far tokens: policies with a budget read as many as `rtpurbo` did in the same tests."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rtpurbo.evaluation.cases import HARNESS, Case
from rtpurbo.evaluation.policies import POLICIES, BudgetPolicy
from rtpurbo.evaluation.records import Record


def has_budget(policy: str) -> bool:
    """True if the policy of this name needs a budget of far tokens."""
    return isinstance(POLICIES[policy], BudgetPolicy)


def budget_of(policy: str, case: Case, records: Iterable[Record]) -> int | None:
    """The far tokens that a policy may read in a row of a test; None for those that have no budget.

    Args:
        policy: its name.
        case: the test.
        records: as `far_token_budget` takes them; not asked for where there is no budget.
    """
    return far_token_budget(case, records) if has_budget(policy) else None


def far_token_budget(case: Case, records: Iterable[Record]) -> int:
    """The far tokens that a row may read: the mean of those records that count, rounded up.

    They are those of the suite's tests at the length. Tasks of lm-eval have nothing in common but
    the model's context, so each has a budget of its own. Nobody gets less than the mean; where no
    row has anything far, there is nothing to read.

    Args:
        case: the test.
        records: of the policy that sets budgets, one of each test, in the order of the tests.
    """
    far_tokens, rows = 0.0, 0
    for record in records:
        same = (record.suite, record.context_length) == (case.suite, case.context_length)
        if same and (case.suite != HARNESS or record.task == case.task) and record.far_rows:
            assert record.far_tokens_mean is not None
            far_tokens += record.far_tokens_mean * record.far_rows
            rows += record.far_rows
    return math.ceil(far_tokens / rows) if rows else 0

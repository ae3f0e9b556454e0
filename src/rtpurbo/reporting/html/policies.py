"""What is compared, in the report: names, colours, means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rtpurbo.evaluation.policies import BUDGET_POLICY, DENSE_POLICY, POLICIES
from rtpurbo.evaluation.records import Record
from rtpurbo.formats import short_length, suite_title
from rtpurbo.reporting.entries import policy_order
from rtpurbo.reporting.html.markup import Markup, join, tag
from rtpurbo.reporting.html.plots import Series, legend_of
from rtpurbo.reporting.html.svg import swatch


def style_of(policy: str, policies: Sequence[str]) -> int | None:
    """The number of a policy's colour among some policies; None is the dense model's."""
    others = [name for name in policies if name != DENSE_POLICY]
    return None if policy == DENSE_POLICY else others.index(policy)


def main_policy(records: Sequence[Record]) -> str | None:
    """The policy that the report is about: `rtpurbo`, else the first sparse one."""
    sparse = [name for name in policy_order(records) if name != DENSE_POLICY]
    return BUDGET_POLICY if BUDGET_POLICY in sparse else next(iter(sparse), None)


def lengths_of(records: Iterable[Record]) -> list[int]:
    """The context lengths of some records, ascending."""
    return sorted({record.context_length for record in records})


def name_of(record: Record, with_length: bool = True) -> str:
    """What was asked: task, metric where there are several, and length."""
    name = record.task if record.metric is None else f"{record.task} {record.metric}"
    # Questions with lengths of their own have none to name.
    if record.context_length == 0:
        return suite_title(record.suite)
    return f"{name} {short_length(record.context_length)}" if with_length else name


def mean_of_rows(records: Iterable[Record], field: str) -> float | None:
    """The mean of a figure over measured rows, each of which counts for as much."""
    known = [
        record for record in records if record.measured_rows and getattr(record, field) is not None
    ]
    rows = sum(record.measured_rows for record in known)
    total = sum(getattr(record, field) * record.measured_rows for record in known)
    return total / rows if rows else None


def plots_of_policies(plots: Sequence[Markup], policies: Sequence[str]) -> Markup:
    """Plots with one legend for all."""
    legend = legend_of([Series(name, (), style_of(name, policies)) for name in policies])
    return join(tag("div", plots, class_="plots"), legend)


def described(policies: Sequence[str]) -> Markup:
    """A list of policies with their colours and what each is."""
    entries = []
    for name in policies:
        description = POLICIES[name].description if name in POLICIES else ""
        for short in ("the same, ", "the same with "):
            if description.startswith(short):
                description = description.replace("the same", f"as {BUDGET_POLICY}", 1)
        said = tag("dd", description or "an addition of the results' author")
        entries.append(tag("div", tag("dt", swatch(style_of(name, policies)), name), said))
    return tag("dl", entries, class_="policies")

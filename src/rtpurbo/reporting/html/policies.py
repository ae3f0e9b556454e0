"""Policies in the report: order, colours, means and descriptions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rtpurbo.evaluation.policies import BUDGET_POLICY, DENSE_POLICY, POLICIES
from rtpurbo.evaluation.records import Record
from rtpurbo.reporting.figures import Series
from rtpurbo.reporting.html.sources import Quality, Sources
from rtpurbo.reporting.html.view import Block, Definitions, Heading, Legend, Plot, Plots, swatch
from rtpurbo.reporting.selection import lengths_of, pick, policy_order


def style_of(policy: str, policies: Sequence[str]) -> int | None:
    """Returns the index of a policy's colour; None for the dense model."""
    others = [name for name in policies if name != DENSE_POLICY]
    return None if policy == DENSE_POLICY else others.index(policy)


def main_policy(records: Sequence[Record]) -> str | None:
    """Returns the policy that the report is about: `rtpurbo`, else the first sparse one."""
    sparse = [name for name in policy_order(records) if name != DENSE_POLICY]
    return BUDGET_POLICY if BUDGET_POLICY in sparse else next(iter(sparse), None)


def by_model(sources: Sources, blocks_of: Callable[[Quality], list[Block]]) -> list[Block]:
    """Returns the blocks of each model, with its name above them where there are several."""
    blocks: list[Block] = []
    for quality in sources.quality:
        if own := blocks_of(quality):
            if len(sources.quality) > 1:
                blocks.append(Heading(f"Model: {quality.model}"))
            blocks += own
    return blocks


def lines_by_length(
    records: Sequence[Record],
    policies: Sequence[str],
    mean: Callable[[Sequence[Record], str], float | None],
) -> list[Series]:
    """Returns a line over context lengths for each policy that has values, coloured by its place among all policies.

    `mean` returns a policy's value from the records of one length.
    """
    lines = []
    for policy in policies:
        means = [
            (length, mean(pick(records, context_length=length), policy))
            for length in lengths_of(records)
        ]
        points = [(float(length), value) for length, value in means if value is not None]
        if points:
            lines.append(Series(policy, points, style_of(policy, policies)))
    return lines


def plots_of_policies(plots: Sequence[Plot], policies: Sequence[str]) -> Plots:
    """Returns plots with one legend for all."""
    return Plots(
        plots, Legend.of([Series(name, (), style_of(name, policies)) for name in policies])
    )


def described(policies: Sequence[str]) -> Definitions:
    """Returns policies with their colours and descriptions."""
    entries = []
    for name in policies:
        description = POLICIES[name].description if name in POLICIES else ""
        if description.startswith(("the same, ", "the same with ")):
            description = description.replace("the same", f"as {BUDGET_POLICY}", 1)
        said = description or "defined by the author of the results"
        entries.append((name, *swatch(style_of(name, policies)), said))
    return Definitions(entries)

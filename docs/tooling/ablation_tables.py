"""Tables of the ablations in benchmarks/results, one for each kind of measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

import torch

from rtpurbo.calibration.selection import measure_stability
from rtpurbo.evaluation.bootstrap import bootstrap_interval
from rtpurbo.formats import percent

PROSE = "prose"
RECALLS = (0.9, 0.95, 0.98)

NOTE = (
    "Score: answers of which every token is the likeliest, in percent; minus the reference: paired by "
    "question. Divergence: from the dense teacher over its ten likeliest tokens and any other token, in "
    "nats per token. Brackets: 95 % intervals by bootstrap over questions or windows. Far tokens: read "
    "beyond sinks and window by a query that predicts an answer; attention recall: of these queries."
)


def group_markdown(group: dict[str, Any]) -> str:
    """Returns the tables of a group's file."""
    lines = [f"### {group['group']}: {group['question']}", ""]
    origin = ", ".join(f"{name} {value}" for name, value in group["origin"].items())
    lines += [f"{origin}; reference: {group['reference']}.", ""]
    answered = [record for record in group["records"] if "answers" in record]
    for length in dict.fromkeys(key for record in answered for key in record["answers"]):
        records = [record for record in answered if length in record["answers"]]
        lines += [f"At {int(length):,} tokens:", "", *_answers(records, group["reference"], length)]
    for table in (_index, _histograms, _maps):
        lines += table(group["records"])
    if answered:
        lines += [NOTE, ""]
    return "\n".join(lines)


def _answers(records: Sequence[dict[str, Any]], reference: str, length: str) -> list[str]:
    tasks = [kind for kind in records[0]["answers"][length] if kind != PROSE]
    base = next((record for record in records if record["arm"] == reference), None)
    lines = [
        f"| arm | {' | '.join(tasks)} | score | minus reference | divergence of answers "
        "| of prose | perplexity | times the teacher's | far tokens (answers, prose) "
        "| attention recall (answers, prose) | heads, KV heads | s |",
        f"|---|{'---:|' * len(tasks)}---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for record in records:
        answers, found = record["answers"][length], record["summary"][length]
        shares = [
            f"{100 * sum(answers[task]['right']) / len(answers[task]['right']):.0f}"
            for task in tasks
        ]
        difference = ""
        if base is not None and tasks:
            difference = _signed(_paired_difference(record, base, length))
        ratio = found["perplexity_ratio"]
        lines.append(
            f"| {record['arm']} | {' | '.join(shares)} | {_interval(found.get('score'), '.1f')} "
            f"| {difference} | {_interval(found.get('answer_divergence'), '.4f')} "
            f"| {_interval(found['prose_divergence'], '.4f')} | {found['perplexity']:.2f} "
            f"| {_interval(ratio, '.4f')} | {_reads(found, 'far_tokens_mean', '.0f')} "
            f"| {_reads(found, 'mass_kept', '.3f')} | {_heads(record)} "
            f"| {record['seconds']:.0f} |"
        )
    return [*lines, ""]


def _index(records: Sequence[dict[str, Any]]) -> list[str]:
    measured = [record for record in records if "index" in record]
    lines = []
    for length in dict.fromkeys(key for record in measured for key in record["index"]):
        columns = [
            ("KL", lambda one: _number(one["divergence"], ".3f")),
            ("tokens of prose", lambda one: _at(one["tokens"], ".0f")),
            ("tokens of answers", lambda one: _at(one["answer_tokens"], ".0f")),
            ("far keys in block lists", lambda one: _at(one["blocks"], ".3f")),
            ("recall and tokens at p .90", lambda one: _point(one["at_p"]["0.9"])),
            ("the same of answers", lambda one: _point(one["answers_at_p"].get("0.9"))),
        ]
        lines += [
            f"Read at {int(length):,} tokens, at recalls of {', '.join(map(str, RECALLS))}:",
            "",
            f"| index | {' | '.join(name for name, _ in columns)} |",
            f"|---|{'---:|' * len(columns)}",
            *(
                f"| {record['arm']} | "
                + " | ".join(show(record["index"][length]) for _, show in columns)
                + " |"
                for record in measured
                if length in record["index"]
            ),
            "",
        ]
    return lines


def _histograms(records: Sequence[dict[str, Any]]) -> list[str]:
    """Far tokens that queries read, for arms that were measured at several lengths."""
    lines = []
    for record in records:
        if len(record.get("answers", ())) < 2:
            continue
        lines += [
            f"{record['arm']}, shares of queries by far tokens read:",
            "",
            "| kind | length | far tokens: mean | share | attention recall | histogram |",
            "|---|---:|---:|---:|---:|---|",
        ]
        for length, answers in record["answers"].items():
            for kind, entry in answers.items():
                reads = entry["reads"]
                if not reads or not reads["far_rows"]:
                    continue
                lines.append(
                    f"| {kind} | {int(length):,} | {reads['far_tokens_mean']:.0f} "
                    f"| {percent(reads['far_share'])} | {reads['mass_kept']:.3f} "
                    f"| {_histogram(reads['far_histogram'])} |"
                )
        lines.append("")
    return lines


def _maps(records: Sequence[dict[str, Any]]) -> list[str]:
    """Agreement of the documents of each head map, and of each pair of maps."""
    maps = [record for record in records if "map" in record]
    if not maps:
        return []
    lines = [
        "| map | Spearman among documents | top heads in common | best scores (1st, 5th, 10th, 20th, last) |",
        "|---|---:|---:|---|",
    ]
    for record in maps:
        stability = record["map"]["stability"]
        count = stability["num_top_heads"]
        ranked = sorted(record["map"]["scores"], reverse=True)
        best = ", ".join(f"{ranked[min(place, count) - 1]:.3f}" for place in (1, 5, 10, 20, count))
        lines.append(
            f"| {record['arm']} | {stability['rank_correlation']:.3f} "
            f"| {percent(stability['overlap'])} of {count} | {best} |"
        )
    lines += ["", "| two maps | Spearman | top heads in common |", "|---|---:|---:|"]
    for one, other in combinations(maps, 2):
        both = torch.tensor([one["map"]["scores"], other["map"]["scores"]])
        agreement = measure_stability(both, one["map"]["stability"]["num_top_heads"])
        assert agreement is not None
        lines.append(
            f"| {one['arm']}; {other['arm']} | {agreement.rank_correlation:.3f} "
            f"| {percent(agreement.overlap)} |"
        )
    return [*lines, ""]


def _paired_difference(
    record: dict[str, Any], reference: dict[str, Any], length: str
) -> dict[str, Any]:
    """Difference of right answers in percent from the reference's, paired by question."""
    own, others = (one["answers"][length] for one in (record, reference))
    gains = [
        100.0 * (float(a) - float(b))
        for kind in own
        if kind != PROSE
        for a, b in zip(own[kind]["right"], others[kind]["right"], strict=True)
    ]
    return {"mean": fmean(gains), "ci95": bootstrap_interval(gains)}


def _interval(found: dict[str, Any] | None, digits: str) -> str:
    if found is None:
        return "-"
    low, high = found["ci95"]
    return f"{found['mean']:{digits}} [{low:{digits}}, {high:{digits}}]"


def _signed(found: dict[str, Any]) -> str:
    low, high = found["ci95"]
    return f"{found['mean']:+.1f} [{low:+.1f}, {high:+.1f}]"


def _reads(found: dict[str, Any], figure: str, digits: str) -> str:
    shown = [
        f"{found[kind][figure]:{digits}}" if kind in found and figure in found[kind] else "all"
        for kind in ("answers", "prose")
    ]
    return "all" if shown == ["all", "all"] else ", ".join(shown)


def _heads(record: dict[str, Any]) -> str:
    if "retrieval_heads" not in record:
        return ""
    return f"{record['retrieval_heads']}, {record['full_key_value_heads']}"


def _number(value: float | None, digits: str) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:{digits}}"


def _at(by_recall: dict[str, float | None], digits: str) -> str:
    return " / ".join(_number(by_recall[str(recall)], digits) for recall in RECALLS)


def _point(point: Sequence[float] | None) -> str:
    return "-" if point is None else f"{point[0]:.3f}, {point[1]:.0f}"


def _histogram(counts: Sequence[int]) -> str:
    """Share of each bin that is not empty, named by its lower bound in tokens."""
    total = sum(counts)
    return ", ".join(
        f"{2 ** (place - 1) if place else 0}{'+' if place else ''}: {100 * count / total:.0f} %"
        for place, count in enumerate(counts)
        if count
    )

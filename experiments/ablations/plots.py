"""One picture of what the ablations found: heads, index, rules and what rows read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ablations.questions import PROSE
from ablations.results import least_tokens

RECALL = "0.95"
SPACES = {"slow pairs": "low_frequency", "pre-RoPE (paper)": "pre_rope", "post-RoPE": "post_rope"}
READINGS = ("residual", "paper", "far")
FULL, DENSE = "full attention", "dense retrieval heads"

Group = Mapping[str, Any]
Record = Mapping[str, Any]


def draw(groups: Mapping[str, Group], path: Path, title: str) -> None:
    """Draws a panel for each of the groups a, b, c and f that is there.

    Args:
        groups: files of results, by the group's letter.
        path: the picture; its ending chooses the format.
        title: above all panels.
    """
    from matplotlib import pyplot

    panels: dict[str, Callable[[Any, Mapping[str, Group]], None]] = {
        "b": draw_heads, "c": draw_index, "a": draw_rules, "f": draw_reads,
    }  # fmt: skip
    there = [letter for letter in panels if letter in groups]
    rows = -(-len(there) // 2)
    figure, axes = pyplot.subplots(
        rows, 2, figsize=(10, 4.2 * rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(there) :]:
        axis.set_visible(False)
    for letter, axis in zip(there, axes.flat, strict=False):
        panels[letter](axis, groups)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_heads(axis: Any, groups: Mapping[str, Group]) -> None:
    """Right answers against the number of retrieval heads, before and after training."""
    records = [
        record for record in groups["b"]["records"] if "calibration.ratio" in record["changes"]
    ]
    records += [
        record for record in _records(groups, "e") if "calibration.threshold" in record["changes"]
    ]
    for name, trained in (("before training", False), ("after 100 steps of stage 2", True)):
        chosen = [record for record in records if ("stage2.steps" in record["changes"]) == trained]
        chosen.sort(key=lambda record: record["retrieval_heads"])
        scores = [_only(record["summary"])["score"] for record in chosen]
        means = [score["mean"] for score in scores]
        errors = [
            [score["mean"] - score["ci95"][0] for score in scores],
            [score["ci95"][1] - score["mean"] for score in scores],
        ]
        # Side by side, so that intervals can be told apart.
        heads = [record["retrieval_heads"] + 0.8 * trained for record in chosen]
        axis.errorbar(heads, means, errors, marker="o", capsize=3, label=name)
    full = _named(_records(groups, "a"), FULL)
    if full is not None:
        axis.axhline(_only(full["summary"])["score"]["mean"], ls="--", color="gray", label=FULL)
    axis.set_title("How many heads must retrieve?")
    axis.set_xlabel("query heads that retrieve")
    axis.set_ylabel("right answers, percent")
    axis.set_ylim(0, 100)


def draw_index(axis: Any, groups: Mapping[str, Group]) -> None:
    """Tokens that must be read for most of the mass, against the dimensions of the index."""
    records = groups["c"]["records"]
    length = max(records[0]["index"], key=int)
    for name, space in SPACES.items():
        points = {
            int(record["changes"].get("indexer.index_dim", 16)): _tokens(record, length)
            for record in records
            if record["changes"].get("indexer.index_space", "low_frequency") == space
            and not any(change.startswith("stage1.") for change in record["changes"])
            and record["arm"] != "exact scores"
        }
        dimensions = sorted(points)
        axis.plot(dimensions, [points[size] for size in dimensions], marker="o", label=name)
    exact = _named(records, "exact scores")
    if exact is not None:
        axis.axhline(_tokens(exact, length), ls="--", color="gray", label="exact scores")
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:.0f}")
    axis.yaxis.set_major_formatter("{x:,.0f}")
    axis.set_ylim(bottom=0)
    axis.set_title(f"Which index at {int(length):,} tokens?")
    axis.set_xlabel("dimensions of the index")
    axis.set_ylabel(f"tokens of prose to read for {float(RECALL):.0%} of the mass")


def draw_rules(axis: Any, groups: Mapping[str, Group]) -> None:
    """How far answers are from the dense model's, against what their rows read."""
    records = [record for record in groups["a"]["records"] if "index trained" not in record["arm"]]
    kinds: dict[str, list[Record]] = {reading: [] for reading in READINGS}
    kinds |= {"residual, at least 128": [], "top-k": []}
    for record in records:
        rule = record["rule"]
        if record["arm"].startswith("top-k"):
            kinds["top-k"].append(record)
        elif rule.get("min_tokens"):
            kinds["residual, at least 128"].append(record)
        elif rule.get("reading") in kinds:
            kinds[rule["reading"]].append(record)
    for name, found in kinds.items():
        points = sorted(
            (summary["answers"]["far_tokens_mean"], summary["answer_divergence"]["mean"])
            for summary in (_only(record["summary"]) for record in found)
        )
        if points:
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
    dense = _named(records, DENSE)
    if dense is not None:
        divergence = _only(dense["summary"])["answer_divergence"]["mean"]
        axis.axhline(divergence, ls="--", color="gray", label=DENSE)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_ylim(bottom=0)
    axis.set_title("Which rule of selection?")
    axis.set_xlabel("far tokens that a row of an answer reads")
    axis.set_ylabel("divergence from the dense model, nats")


def draw_reads(axis: Any, groups: Mapping[str, Group]) -> None:
    """Shares of rows by the far tokens that they read, at the longest length."""
    record = next(record for record in groups["f"]["records"] if "answers" in record)
    length = max(record["answers"], key=int)
    entries = record["answers"][length]
    answers = [entry["reads"]["far_histogram"] for kind, entry in entries.items() if kind != PROSE]
    named = {"rows of answers": _sums(answers)}
    if PROSE in entries:
        named["rows of prose"] = entries[PROSE]["reads"]["far_histogram"]
    classes = max(map(len, named.values()))
    first = min(
        next(place for place, count in enumerate(counts) if count) for counts in named.values()
    )
    width = 0.8 / len(named)
    for number, (name, counts) in enumerate(named.items()):
        shares = [100 * count / sum(counts) for count in counts] + [0.0] * (classes - len(counts))
        places = [place + number * width for place in range(first, classes)]
        axis.bar(places, shares[first:], width, label=name)
    ticks = range(first, classes)
    axis.set_xticks(
        [tick + width / 2 for tick in ticks], [f"{least_tokens(tick):,}+" for tick in ticks]
    )
    axis.set_title(f"How much does a row read at {int(length):,} tokens?")
    axis.set_xlabel("far tokens read")
    axis.set_ylabel("rows, percent")


def _records(groups: Mapping[str, Group], letter: str) -> Sequence[Record]:
    return groups[letter]["records"] if letter in groups else []


def _named(records: Sequence[Record], arm: str) -> Record | None:
    return next((record for record in records if record["arm"] == arm), None)


def _only(by_length: Mapping[str, Any]) -> Any:
    """The entry of the one length that an arm was measured at."""
    [entry] = by_length.values()
    return entry


def _tokens(record: Record, length: str) -> float:
    found = record["index"][length]["tokens"][RECALL]
    return float("nan") if found is None else found


def _sums(histograms: Sequence[Sequence[int]]) -> list[int]:
    longest = max(map(len, histograms))
    padded = [[*counts, *[0] * (longest - len(counts))] for counts in histograms]
    return [sum(counts) for counts in zip(*padded, strict=True)]

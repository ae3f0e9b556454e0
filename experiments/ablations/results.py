"""Records of arms in one JSON file a group, with scores and how sure they are."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ablations.arms import Group
from ablations.questions import PROSE
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.bootstrap import bootstrap_interval
from rtpurbo.files import write_json_atomically


class GroupFile:
    """The records of a group, kept as they come.

    Args:
        folder: of all groups' files.
        group: what they belong to.
        origin: what the figures depend on beside the arms.

    Raises:
        RTPurboError: the file was made with other settings.
    """

    def __init__(self, folder: Path, group: Group, origin: dict[str, Any]) -> None:
        self.path = folder / f"{group.name}.json"
        self.group = group
        self.origin = json.loads(json.dumps(origin))
        self.records: list[dict[str, Any]] = []
        if self.path.is_file():
            kept = json.loads(self.path.read_text(encoding="utf-8"))
            if kept["origin"] != self.origin:
                raise RTPurboError(
                    f"{self.path} was made with other settings: choose another output folder."
                )
            self.records = kept["records"]

    def record(self, arm: str) -> dict[str, Any] | None:
        """What was found out about an arm, if it was."""
        return next((record for record in self.records if record["arm"] == arm), None)

    def add(self, record: dict[str, Any]) -> None:
        """Keeps a record, in the order of the plan."""
        order = [arm.name for arm in self.group.arms]
        self.records.append(record)
        self.records.sort(key=lambda one: order.index(one["arm"]))
        write_json_atomically(
            self.path,
            {
                "group": self.group.name,
                "question": self.group.question,
                "reference": self.group.reference,
                "origin": self.origin,
                "records": self.records,
            },
        )


def summary(answers: dict[str, Any]) -> dict[str, Any]:
    """The figures of one length: means over all questions, each with its 95 % interval.

    Args:
        answers: as `answer_all` gives them.

    Returns:
        `score` in percent of right answers and `answer_divergence` from the teacher in nats a token,
        if a task fits the length; `prose_divergence`; `perplexity` of prose and `perplexity_ratio` to the teacher's;
        `far_tokens` and `mass_kept` of rows that answer and rows of prose, and `far_share`.
    """
    tasks = [answers[kind] for kind in answers if kind != PROSE]
    found: dict[str, Any] = {}
    if tasks:
        found["score"] = _mean([100.0 * right for task in tasks for right in task["right"]])
        found["answer_divergence"] = _mean(
            [value for task in tasks for value in task["divergence"]]
        )
    prose = answers[PROSE]
    more = [a - b for a, b in zip(prose["loss"], prose["teacher_loss"], strict=True)]
    found["prose_divergence"] = _mean(prose["divergence"])
    found["perplexity"] = math.exp(fmean(prose["loss"]))
    found["perplexity_ratio"] = {
        "mean": math.exp(fmean(more)),
        "ci95": [math.exp(edge) for edge in bootstrap_interval(more)],
    }
    for name, parts in (("answers", tasks), ("prose", [prose])):
        reads = [part["reads"] for part in parts]
        if reads and all(read and read["rows"] for read in reads):
            found[name] = {
                figure: fmean(read[figure] for read in reads)
                for figure in ("far_tokens_mean", "far_share", "mass_kept", "tokens_mean")
                if all(read[figure] is not None for read in reads)
            }
    return found


def paired_difference(
    record: dict[str, Any], reference: dict[str, Any], length: str, figure: str
) -> dict[str, Any]:
    """How a figure of the answers differs from the reference's, question by question.

    Args:
        record: of an arm.
        reference: of another that was asked the same.
        length: which of their lengths.
        figure: `right`, told in percent, or `divergence`.
    """
    mine, others = (one["answers"][length] for one in (record, reference))
    factor = 100.0 if figure == "right" else 1.0
    return _mean(
        [
            factor * (float(a) - float(b))
            for kind in mine
            if kind != PROSE
            for a, b in zip(mine[kind][figure], others[kind][figure], strict=True)
        ]
    )


def _mean(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": fmean(values), "ci95": list(bootstrap_interval(values))}


def least_tokens(place: int) -> int:
    """The least tokens of a class of a histogram of reads: none, 1, 2 to 3, 4 to 7, and so on."""
    return 2 ** (place - 1) if place else 0

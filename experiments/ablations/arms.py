"""What an ablation is: groups of arms, each a way to convert and to read, and what is measured of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rtpurbo.config import Reading

Stage = Literal["teacher", "map", "index", "student"]
HeadChoice = Literal["global", "per_layer", "random", "kv_group_same_memory", "divergence"]
WindowChoice = Literal["one", "output_error", "lost_mass"]
Objective = Literal["top_logits", "vocabulary"]
Measure = Literal["answers", "index", "map"]
Text = Literal["train", "heldout", "python"]

DENSE_HEADS = {"top_p": 1.0}
"""The attention rule under which retrieval heads read everything, so that no indexer is judged."""


@dataclass(frozen=True)
class Arm:
    """One way to convert a model and to read with it.

    Attributes:
        name: unique in its group.
        seconds: roughly, on one H100 at 8,192 tokens, with what it trains for itself.
        quick: part of the short run.
        stage: how far the conversion goes: not at all, head map alone, trained indexers, or stage 2.
        changes: fields of the conversion's settings, as `rtpurbo.settings.change_settings` takes them.
        rule: fields of the attention rule that are changed when it is measured, not when it is trained.
        choice: how retrieval heads are taken, given their scores.
        windows: one window for all local heads, or one a head with the same mean, chosen by how much
            of a head's output or of its attention mass a window loses.
        objective: what stage 2 minimises: the divergence over the teacher's likeliest tokens, or over
            the whole vocabulary.
        refresh_reading: the reading that the refreshed indexers are trained for; None for the rule's.
        budget_of: the arm of the group whose mean number of far tokens every row reads (top-k).
        oracle: exact scores in place of the indexers', where indexers are measured.
        measure: answers and prose, the quality of the index, or a head map.
        lengths: tokens of what is measured.
        text: where a head map is measured.
    """

    name: str
    seconds: float
    quick: bool = False
    stage: Stage = "student"
    changes: Mapping[str, Any] = field(default_factory=dict)
    rule: Mapping[str, Any] = field(default_factory=dict)
    choice: HeadChoice = "global"
    windows: WindowChoice = "one"
    objective: Objective = "top_logits"
    refresh_reading: Reading | None = None
    budget_of: str | None = None
    oracle: bool = False
    measure: Measure = "answers"
    lengths: tuple[int, ...] = ()
    text: Text = "train"

    @property
    def selects(self) -> bool:
        """Whether rows select their keys when it is measured."""
        return self.stage in ("index", "student") and self.rule.get("top_p") != 1.0


@dataclass(frozen=True)
class Group:
    """Arms that answer one question together.

    Attributes:
        name: one letter.
        question: what they answer.
        arms: the most telling first; an arm comes after the one whose budget it takes.
        reference: the arm that the others are compared with.
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    reference: str

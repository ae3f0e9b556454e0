"""Number of full KV heads: more than a fixed share where the answers of long-range tasks need more.

One share does not suit all models: with 30 % of the KV heads, Qwen2.5-Coder-1.5B keeps its mean accuracy at 16K, while
Gemma 3 270M, whose full layers have three, misses half of its needles at 8K (docs/experiment-log.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.calibration.answer_sequences import Sequences, answer_positions
from rtpurbo.calibration.gates import TARGETS, gated_answers, gated_model
from rtpurbo.config import AttentionRule, HeadMap
from rtpurbo.data.prompts import Conversation
from rtpurbo.models.sparsify import runtime
from rtpurbo.settings import CalibrationSettings, Progress, no_progress
from rtpurbo.training.sequences import TrainingSequence
from rtpurbo.training.stage2 import autocast, loss_on
from rtpurbo.training.teacher import TeacherTargets, targets_at

STEP = 0.08
"""Share of the heads that is added at a time."""

SEQUENCES = 6
"""Sequences with answers on which a number of heads is tried."""


@dataclass(frozen=True)
class Budget:
    """Chosen number of retrieval heads.

    Attributes:
        head_map: the heads.
        divergences: mean divergence from the dense model by share of heads tried, in nats per token of the answers.
    """

    head_map: HeadMap
    divergences: Mapping[float, float]


def choose_budget(
    model: PreTrainedModel,
    choose: Callable[[float], HeadMap],
    sequences: Sequences,
    rule: AttentionRule,
    settings: CalibrationSettings,
    *,
    progress: Progress = no_progress,
) -> Budget:
    """Adds retrieval heads until answers diverge from those of the dense model by at most `max_divergence`.

    Retrieval heads read everything, so that what is measured is lost by windows alone.

    Args:
        model: dense.
        choose: returns the head map with a share of the heads.
        sequences: longer than sinks and window; those without answers are skipped.
        rule: windows, heavy hitters and dense prompt queries of a windowed head.
        settings: `ratio` is the smallest share tried; `max_divergence` is not None.
        progress: called after each share.
    """
    assert settings.max_divergence is not None
    # By number of heads: a share may bring no whole KV head more than the one before.
    maps: dict[int, tuple[float, HeadMap]] = {}
    for number in range(math.ceil((1 - settings.ratio) / STEP - 1e-6) + 1):
        share = min(1.0, round(settings.ratio + number * STEP, 6))
        head_map = choose(share)
        maps.setdefault(head_map.num_retrieval_heads, (share, head_map))
    divergences: dict[float, float] = {}
    with torch.no_grad(), gated_model(model, rule, per_group=False) as gates:
        drawn = [sequences.sequence(number) for number in range(SEQUENCES)]
        answered = [_Answered.by(model, each) for each in drawn if each.answer_spans]
        for share, head_map in maps.values():
            for layer, gate in gates.items():
                gate.zero_()
                gate[list(head_map.retrieval_heads[layer] or ())] = 1.0
            found = sum(each.divergence(model, rule, gates) for each in answered)
            divergences[share] = found / max(1, len(answered))
            is_enough = divergences[share] <= settings.max_divergence
            tried = len(divergences)
            figures = {"share": share, "divergence": divergences[share]}
            progress("heads", tried, tried if is_enough else len(maps), figures)
            if is_enough:
                break
    return Budget(head_map, divergences)


@dataclass(frozen=True)
class _Answered:
    """Sequence with the dense model's predictions of its answers."""

    conversation: Conversation
    targets: TeacherTargets

    @classmethod
    def by(cls, model: PreTrainedModel, conversation: Conversation) -> _Answered:
        places = answer_positions(conversation)
        every = torch.ones(len(places), dtype=torch.bool)
        with runtime(model).dense(), autocast(model):
            targets = targets_at(
                model, conversation.input_ids, torch.tensor(places), every, TARGETS.top_logits
            )
        return cls(conversation, targets)

    def divergence(
        self, model: PreTrainedModel, rule: AttentionRule, gates: Mapping[int, Tensor]
    ) -> float:
        """Mean divergence over the tokens of the answers, in nats."""
        with gated_answers(model, rule, gates, self.conversation):
            sequence = TrainingSequence(self.conversation.input_ids)
            return loss_on(model, sequence, self.targets, _MEAN).item()


_MEAN = replace(TARGETS, answer_weight=0.0)
"""Settings of a loss that is the mean divergence over all targets."""

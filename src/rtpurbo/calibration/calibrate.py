"""Calibration of a dense model on texts, which finds its retrieval heads."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo import strict_json
from rtpurbo.calibration.answer_sequences import AnswerSequences
from rtpurbo.calibration.budget import choose_budget
from rtpurbo.calibration.chains import chain_scores, make_chain_document
from rtpurbo.calibration.gates import train_gates
from rtpurbo.calibration.scores import retrieval_scores
from rtpurbo.calibration.selection import Stability, choose_heads, in_turn, measure_stability
from rtpurbo.config import AttentionRule, HeadMap, default_sliding_window, head_map_from_dict
from rtpurbo.data.needles import make_calibration_document
from rtpurbo.data.texts import TextCorpus
from rtpurbo.errors import RTPurboError
from rtpurbo.lengths import check_context
from rtpurbo.models.architecture import context_length
from rtpurbo.models.sparsify import empty_head_map
from rtpurbo.renamed_settings import current_settings
from rtpurbo.settings import (
    CalibrationSettings,
    Progress,
    no_progress,
)
from rtpurbo.training.checkpoint import Checkpoint


@dataclass(frozen=True)
class Calibration:
    """Result of a calibration.

    Attributes:
        head_map: retrieval heads and scores.
        stability: agreement of the documents; None if it was not measured.
        settings: settings of the calibration; None if they are not known.
        divergences: by share of heads tried, if the number of heads was found by them: see `Budget`.
    """

    head_map: HeadMap
    stability: Stability | None
    settings: CalibrationSettings | None = None
    divergences: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON types."""
        return asdict(self)


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: TextCorpus,
    settings: CalibrationSettings | None = None,
    *,
    rule: AttentionRule | None = None,
    seed: int = 0,
    checkpoint: Checkpoint | None = None,
    progress: Progress = no_progress,
) -> Calibration:
    """Finds the retrieval heads.

    Scores are gates trained on long-range tasks, or means over documents: prose with needles at depths from 5 % to
    50 % (repeated filler would draw attention to every copy, docs/experiment-log.md), chains of variables, or both,
    whose best heads are taken in turn.

    Args:
        model: dense.
        tokenizer: the model's.
        corpus: prose in which the needles are hidden.
        settings: documents and choice.
        rule: sinks and window of a head with a closed gate; None for the default of the context.
        seed: seed of the documents.
        checkpoint: of the gates, restored at the start and saved regularly.
        progress: called after each document.

    Raises:
        RTPurboError: documents are longer than the model's context or than the text.
    """
    settings = settings or CalibrationSettings()
    check_context("documents", settings.length, context_length(model.config))
    if settings.ranking == "gates":
        return _by_gates(model, tokenizer, corpus, settings, rule, seed, checkpoint, progress)
    kinds = (
        ("induction", "variable_tracking")
        if settings.ranking == "interleaved"
        else (settings.ranking,)
    )
    # By kind, the scores of all heads of all layers that each document gives.
    measured_by_kind: dict[str, list[Tensor]] = {kind: [] for kind in kinds}
    sizes: dict[int, int] = {}
    for number in range(settings.num_documents):
        for kind in kinds:
            scores = _scores(kind, model, tokenizer, corpus, settings, seed, number)
            sizes = {layer: len(scores[layer]) for layer in sorted(scores)}
            measured_by_kind[kind].append(torch.cat([scores[layer] for layer in sizes]))
        progress("calibrate", number + 1, settings.num_documents, {})
    measured = [torch.stack(documents) for documents in measured_by_kind.values()]
    mean = _together(*(documents.mean(0) for documents in measured))
    by_document = torch.stack([_together(*each) for each in zip(*measured, strict=True)])
    by_layer = dict(zip(sizes, mean.split(list(sizes.values())), strict=True))
    head_map = _chosen(model, by_layer, settings)
    stability = measure_stability(by_document, head_map.num_retrieval_heads)
    return Calibration(head_map, stability, settings)


def _by_gates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: TextCorpus,
    settings: CalibrationSettings,
    rule: AttentionRule | None,
    seed: int,
    checkpoint: Checkpoint | None,
    progress: Progress,
) -> Calibration:
    """Calibrates by gates: retrieval heads are those whose gates stay open."""
    window = default_sliding_window(context_length(model.config))
    ratio = settings.ratio
    if settings.count is not None:
        ratio = min(1.0, settings.count / empty_head_map(model).num_heads)
    rule = rule or AttentionRule(sliding_window=window)
    scores = train_gates(
        model,
        AnswerSequences(tokenizer, corpus, (settings.length,), seed),
        rule,
        steps=settings.num_documents,
        ratio=ratio,
        per_group=settings.granularity == "kv_group",
        checkpoint=checkpoint,
        progress=progress,
    )
    if not settings.may_exceed_ratio:
        return Calibration(_chosen(model, scores, settings), None, settings)
    # Other sequences than those of the gates and of top-p.
    unseen = AnswerSequences(tokenizer, corpus, (settings.length,), seed + 2)
    budget = choose_budget(
        model,
        lambda share: _chosen(model, scores, replace(settings, ratio=share)),
        unseen,
        rule,
        settings,
        progress=progress,
    )
    tried = {f"{share:g}": divergence for share, divergence in budget.divergences.items()}
    return Calibration(budget.head_map, None, settings, tried)


def _chosen(
    model: PreTrainedModel, scores: dict[int, Tensor], settings: CalibrationSettings
) -> HeadMap:
    """Returns the head map of scores by layer."""
    by_layer: list[list[float] | None] = [None] * model.config.num_hidden_layers
    for layer, values in scores.items():
        by_layer[layer] = values.tolist()
    return choose_heads(by_layer, empty_head_map(model).num_key_value_heads, settings)


def _together(first: Tensor, *second: Tensor) -> Tensor:
    """Returns scores of one kind unchanged, and those of two kinds merged by `in_turn`."""
    return in_turn(first, *second) if second else first


def _scores(
    kind: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    corpus: TextCorpus,
    settings: CalibrationSettings,
    seed: int,
    number: int,
) -> dict[int, Tensor]:
    """Returns the scores of one document by layer."""
    if kind == "variable_tracking":
        rng = random.Random(f"chains-{seed}-{number}")
        chained = make_chain_document(tokenizer, corpus, settings.length, rng)
        return chain_scores(model, chained)
    rng = random.Random(f"calibration-{seed}-{number}")
    depth = 0.05 + 0.45 * number / max(1, settings.num_documents - 1)
    document = make_calibration_document(tokenizer, corpus, settings.length, rng, depth=depth)
    return retrieval_scores(model, document)


def read_calibration(path: Path) -> Calibration:
    """Reads the file that `rtpurbo calibrate` wrote.

    Raises:
        RTPurboError: the file is missing or is not one.
    """
    if not path.is_file():
        raise RTPurboError(f"there is no head map at {path}: write one with `rtpurbo calibrate`.")
    try:
        data = strict_json.read(path)
        stability, settings = data.get("stability"), data.get("settings")
        return Calibration(
            head_map_from_dict(data["head_map"]),
            None if stability is None else Stability(**stability),
            None
            if settings is None
            else CalibrationSettings(**current_settings({"calibration": settings})["calibration"]),
            data.get("divergences"),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RTPurboError(
            f"{path} is not a head map of `rtpurbo calibrate`, or it is corrupt."
        ) from error

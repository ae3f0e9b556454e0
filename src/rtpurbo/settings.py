"""Every hyper-parameter of a conversion, stage by stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from rtpurbo.config import (
    AttentionRule,
    HeadGranularity,
    IndexerSettings,
    PrefillMode,
    check_choice,
)
from rtpurbo.errors import RTPurboError
from rtpurbo.validation import checked_value, field_types

IndexerStart = Literal["covariance", "weight", "random"]
Labels = Literal["both", "answers", "text"]
Ranking = Literal["copies", "chains", "turns", "gates"]

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called as (stage, steps done, steps in all, latest figures); see `rtpurbo.cli.progress` for the bars."""


def no_progress(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
    """The default: says nothing."""


@dataclass(frozen=True)
class CalibrationSettings:
    """How retrieval heads are found.

    Attributes:
        length: tokens of a calibration document.
        num_documents: documents, each with a needle at another depth; with `gates`, training steps of one
            sequence each.
        ratio: share of the query heads, or of the KV heads by whole groups, to take; used unless
            `threshold` or `count` is set.
        threshold: take heads whose score reaches this instead.
        count: take this many heads instead.
        granularity: choose heads one by one (`query_head`) or by whole KV groups (`kv_group`).
        ranking: by what heads are ranked: `copies`, as in the paper, how much they look from a sentence back
            to its copy; `chains`, how much they look back where chains of variables are followed; `turns`,
            the best of both in turn; or `gates`, how much the answers of long-range tasks need them
            (`rtpurbo.calibration.gates`).
    """

    length: int = 4096
    num_documents: int = 4
    ratio: float = 0.15
    threshold: float | None = None
    count: int | None = None
    granularity: HeadGranularity = "query_head"
    ranking: Ranking = "copies"

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise RTPurboError(
                f"the ratio of retrieval heads is {self.ratio}, but it must be from 0 to 1."
            )
        if self.threshold is not None and self.count is not None:
            raise RTPurboError("choose retrieval heads by threshold or by count, not by both.")
        if self.num_documents < 1:
            raise RTPurboError("calibration needs at least one document.")
        _check_at_least(1, self, "length")
        _check_at_least(0, self, "count")
        check_choice("granularity", self.granularity, HeadGranularity)
        check_choice("ranking", self.ranking, Ranking)


@dataclass(frozen=True)
class SequenceSettings:
    """What a stage trains on: some kinds of sequences with a question, and prose for the rest.

    Attributes:
        lengths: tokens of a training sequence; sequences take them in turn.
        needle_share: share of sequences that hold needles and a question.
        variable_share: share that hold chains of variables and a question.
        passage_share: share that quote a passage of their prose, to be continued.
        haystack_share: share that hide needles or chains in dull repeated sentences, needles among
            other needles, or needles in prose of which several keys' are asked for at once.
        counting_share: share that ask which words of a list or a text come up most often.
        reading_share: share that ask a plain question about one or two of many paragraphs.
        document_share: share of long documents with an instruction of many kinds and the model's own answer.
        sequences_per_step: sequences of one step, over all processes; None takes one a process.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192)
    needle_share: float = 0.5
    variable_share: float = 0.0
    passage_share: float = 0.0
    haystack_share: float = 0.0
    counting_share: float = 0.0
    reading_share: float = 0.0
    document_share: float = 0.0
    sequences_per_step: int | None = None

    def shares(self) -> dict[str, float]:
        """How much of each kind there is, by the name of its setting."""
        names = (each.name for each in fields(self))
        return {name: getattr(self, name) for name in names if name.endswith("_share")}


@dataclass(frozen=True)
class IndexerTrainingSettings(SequenceSettings):
    """Stage 1: the indexers, on the frozen model. It has the attributes of `SequenceSettings` too.

    Attributes:
        steps: optimiser steps.
        steps_per_sequence: optimiser steps on one captured sequence, each with fresh query rows; with 1
            nothing is captured, and every layer learns as it passes: the way for long sequences.
        rows_per_step: query rows a step and head; None takes every row.
        answer_weight: weight of the mean loss of rows that answer a question, beside that of the
            others; they are few and retrieve, and are met at every step.
        learning_rate: peak of AdamW's, after warm-up, before cosine decay.
        weight_decay: AdamW's.
        warmup_steps: linear warm-up.
        start: what the weights start from (`covariance` is worth a hundred steps).
        start_sequences: sequences whose covariance makes the start.
        probe_sequences: held-out sequences on which recall is watched.
        probe_every: steps between two looks.
    """

    steps: int = 400
    steps_per_sequence: int = 8
    rows_per_step: int | None = 192
    answer_weight: float = 1.0
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    warmup_steps: int = 20
    start: IndexerStart = "covariance"
    start_sequences: int = 3
    probe_sequences: int = 2
    probe_every: int = 50

    def __post_init__(self) -> None:
        _check_training(self)
        check_choice("start", self.start, IndexerStart)
        _check_at_least(
            1, self, "steps_per_sequence", "rows_per_step", "start_sequences", "probe_sequences",
            "probe_every",
        )  # fmt: skip


@dataclass(frozen=True)
class DistillationSettings(SequenceSettings):
    """Stage 2: the sparse student against the dense teacher. It has the attributes of `SequenceSettings` too.

    Attributes:
        steps: optimiser steps; 0 leaves stage 2 out. Three times as many drifted from the teacher on
            questions of other words (docs/experiment-log.md).
        conversation_share: share of short conversations in which the model wrote both sides.
        learning_rate: peak of AdamW's, after warm-up, before cosine decay.
        weight_decay: AdamW's.
        warmup_steps: linear warm-up.
        lora_rank: rank of the LoRA; 0 trains the full weights.
        lora_beyond_attention: LoRA on the MLP's linear layers too.
        lora_scale: factor at which the trained LoRA is applied, from 0 to 1; None takes what brings
            held-out sequences nearest to the dense model and harms no kind of them.
        top_logits: teacher logits kept for each label token (paper: 10).
        labels: which tokens are learnt from: `answers`, those of answers alone (prose has none, and
            is learnt from as `text`); `text`, tokens of the whole sequence alike; or `both`, every
            token of an answer and some of the text before.
        label_stride: of the text, every so many tokens; None takes a random choice.
        labels_per_sequence: label tokens of a sequence, where they are a random choice; with `both`,
            answer tokens are always among them.
        answer_weight: weight of the answer tokens' mean loss beside the mean over all labels.
        cross_entropy_weight: weight of the mean cross-entropy of the labels themselves, beside the
            divergence from the teacher.
        decode_rows: last rows of prose that select their keys as decoding steps do; the rows that write
            an answer always do, unless this is 0.
        gradient_checkpointing: recompute activations in the backward pass, on a GPU: less memory, a
            third more time.
        prefill_mode: what retrieval heads do in training: `dense` as in the paper, or with the selection on.
        refresh_steps: steps of stage 1 on the student at the end.
        checkpoint_every: steps between two checkpoints.
    """

    steps: int = 100
    lengths: tuple[int, ...] = (2048, 8192, 4096, 8192)
    conversation_share: float = 0.0
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    warmup_steps: int = 10
    lora_rank: int = 16
    lora_beyond_attention: bool = False
    lora_scale: float | None = 1.0
    top_logits: int = 10
    labels: Labels = "both"
    label_stride: int | None = None
    labels_per_sequence: int = 4096
    answer_weight: float = 1.0
    cross_entropy_weight: float = 0.0
    decode_rows: int = 256
    gradient_checkpointing: bool = True
    prefill_mode: PrefillMode = "dense"
    refresh_steps: int = 100
    checkpoint_every: int = 20

    def __post_init__(self) -> None:
        _check_training(self)
        _check_at_least(0, self, "lora_rank", "decode_rows", "refresh_steps")
        _check_at_least(1, self, "checkpoint_every")
        if self.top_logits < 1 or self.labels_per_sequence < 1:
            raise RTPurboError("top_logits and labels_per_sequence must be at least 1.")
        check_choice("labels", self.labels, Labels)
        if self.label_stride is not None and self.label_stride < 1:
            raise RTPurboError(f"label_stride is {self.label_stride}, but it must be at least 1.")
        if self.cross_entropy_weight < 0:
            raise RTPurboError(
                f"cross_entropy_weight is {self.cross_entropy_weight}, but it cannot be negative."
            )
        if self.lora_scale is not None and not 0 <= self.lora_scale <= 1:
            raise RTPurboError(
                f"lora_scale is {self.lora_scale}, but it must be from 0 to 1, or null to be found."
            )
        if self.lora_scale != 1 and not self.lora_rank:
            raise RTPurboError(
                "only a LoRA can be scaled: with lora_rank 0, set stage2.lora_scale to 1."
            )


@dataclass(frozen=True)
class StreamSettings:
    """How training texts are read.

    Attributes:
        enabled: read them while training goes on; else they are read into memory first.
        buffer_size: documents shuffled at a time.
        held_out: documents at the beginning that are kept from training; as many after them are
            kept in memory besides, for calibration and the start of the indexers.
    """

    enabled: bool = False
    buffer_size: int = 256
    held_out: int = 64

    def __post_init__(self) -> None:
        if self.buffer_size < 1 or self.held_out < 1:
            raise RTPurboError("buffer_size and held_out of a stream must be at least 1.")


@dataclass(frozen=True)
class ConversionSettings:
    """All of a conversion; `rtpurbo.defaults.default_settings` fits them to a model's context."""

    attention: AttentionRule = field(default_factory=AttentionRule)
    indexer: IndexerSettings = field(default_factory=IndexerSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    stage1: IndexerTrainingSettings = field(default_factory=IndexerTrainingSettings)
    stage2: DistillationSettings = field(default_factory=DistillationSettings)
    stream: StreamSettings = field(default_factory=StreamSettings)
    seed: int = 0

    @property
    def refresh(self) -> IndexerTrainingSettings:
        """Stage 1 again on the student: fewer steps, at half the learning rate."""
        steps = self.stage2.refresh_steps
        return replace(
            self.stage1,
            steps=steps,
            warmup_steps=min(self.stage1.warmup_steps, steps // 4),
            learning_rate=self.stage1.learning_rate / 2,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def check_context(what: str, length: int, context_length: int) -> None:
    """Refuses what is longer than the model's context.

    Args:
        what: its name, in the plural.
        length: tokens of the longest.
        context_length: the model's, in tokens.

    Raises:
        RTPurboError: it is too long.
    """
    if length > context_length:
        raise RTPurboError(
            f"{what} of {length:,} tokens do not fit the model's context of {context_length:,}: "
            "choose a shorter length."
        )


_RENAMED = {"stage2.share": "stage2.lora_scale"}


def change_settings(settings: ConversionSettings, changes: Mapping[str, Any]) -> ConversionSettings:
    """Settings with some fields changed, by dotted name: `{"stage1.steps": 100, "seed": 1}`.

    Raises:
        RTPurboError: there is no such field, or its value is of the wrong type or out of range.
    """
    parts: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        part, _, item = name.rpartition(".")
        owner = _part(settings, part)
        if name in _RENAMED:
            raise RTPurboError(f"the setting '{name}' is called '{_RENAMED[name]}' now.")
        if item not in _names_of(owner):
            raise RTPurboError(f"there is no setting '{name}'.")
        checked = checked_value(name, value, field_types(type(owner))[item])
        parts.setdefault(part, {})[item] = checked
    settings = replace(settings, **parts.pop("", {}))
    # All of a part at once: on the way from one valid state to another, some would not be valid.
    changed = {part: replace(_part(settings, part), **items) for part, items in parts.items()}
    return replace(settings, **changed)


def recorded_changes(recorded: Mapping[str, Any], *parts: str) -> dict[str, Any]:
    """The changes that make parts of any settings those of a record, such as an artifact's.

    Sequences a step are left out, because they depend on how many processes there are.

    Args:
        recorded: what `ConversionSettings.to_dict` gave, of this version or another, or nothing.
        parts: such as `stage1`.
    """
    changes = {}
    for part in parts:
        known = _names_of(_part(ConversionSettings(), part)) - {"sequences_per_step"}
        for name, value in recorded.get(part, {}).items():
            if name in known:
                changes[f"{part}.{name}"] = value
    return changes


def _part(settings: ConversionSettings, name: str) -> Any:
    """The settings of this name, or all for the empty one; None where there are no such ones."""
    return getattr(settings, name) if name in _names_of(settings) else None if name else settings


def _names_of(settings: Any) -> set[str]:
    return {field.name for field in fields(settings)} if is_dataclass(settings) else set()


def _check_training(settings: IndexerTrainingSettings | DistillationSettings) -> None:
    if settings.steps < 0:
        raise RTPurboError(
            f"the number of training steps is {settings.steps}, but it cannot be negative."
        )
    if not settings.lengths or min(settings.lengths) < 1:
        raise RTPurboError("training needs at least one sequence length, in tokens.")
    shares = settings.shares()
    if min(shares.values()) < 0 or sum(shares.values()) > 1 + 1e-9:
        raise RTPurboError(
            f"the shares of sequences are {shares}, but they must be at least 0 and at most 1 together."
        )
    _check_at_least(0, settings, "learning_rate", "weight_decay", "warmup_steps", "answer_weight")
    if settings.sequences_per_step is not None and settings.sequences_per_step < 1:
        raise RTPurboError(
            f"sequences_per_step is {settings.sequences_per_step}, but a step needs at least one."
        )


def _check_at_least(least: int, settings: Any, *names: str) -> None:
    """Refuses fields below a bound; None has no bound."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < least:
            raise RTPurboError(f"{name} is {value}, but it must be at least {least}.")

"""Hyper-parameters of a conversion by stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

from rtpurbo.config import (
    AttentionRule,
    HeadGranularity,
    IndexerSettings,
    PrefillMode,
)
from rtpurbo.data.tasks import TASKS
from rtpurbo.errors import RTPurboError
from rtpurbo.renamed_settings import REMOVED, current_setting, current_settings
from rtpurbo.validation import check_at_least, check_choice, checked_value, field_types

Targets = Literal["both", "answers", "text"]
Ranking = Literal["induction", "variable_tracking", "interleaved", "gates"]

Progress = Callable[[str, int, int, dict[str, float]], None]
"""Called as (stage, steps done, all steps, latest figures); `rtpurbo.cli.progress` draws the bars."""

StageSettings = TypeVar("StageSettings", bound="SequenceSettings")

logger = logging.getLogger(__name__)


def no_progress(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
    """Default of `progress`: does nothing."""


@dataclass(frozen=True)
class CalibrationSettings:
    """Settings of the search for retrieval heads.

    Attributes:
        length: tokens of a calibration document.
        num_documents: documents, each with a needle at another depth; with `gates`, training steps of one
            sequence each.
        ratio: share of the query heads, or of the KV heads by whole groups, to choose; used unless
            `threshold` or `count` is set.
        max_divergence: with `gates`, choose a larger share than `ratio` if with it the answers of calibration diverge
            more from those of the dense model, in nats per token (`rtpurbo.calibration.budget`); None for `ratio`.
        threshold: choose the heads whose score reaches this value instead.
        count: choose this many heads instead.
        granularity: choose single heads (`query_head`) or whole KV groups (`kv_group`).
        ranking: score of a head: `induction` (the paper's copy score), attention from a sentence to its
            earlier copy; `variable_tracking`, attention to earlier assignments along chains of variables;
            `interleaved`, the best heads of both rankings alternately; or `gates`, the effect of the head
            on answers of long-range tasks (`rtpurbo.calibration.gates`).
        top_p_sequences: sequences of `length` tokens by which each layer gets a top-p of its own, once indexers are
            trained (`rtpurbo.calibration.layer_top_p`); 0 for `attention.top_p` in all layers.
    """

    length: int = 4096
    num_documents: int = 4
    ratio: float = 0.15
    max_divergence: float | None = None
    threshold: float | None = None
    count: int | None = None
    granularity: HeadGranularity = "query_head"
    ranking: Ranking = "induction"
    top_p_sequences: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise RTPurboError(
                f"the ratio of retrieval heads is {self.ratio}, but it must be from 0 to 1."
            )
        if self.max_divergence is not None and not self.max_divergence > 0:
            raise RTPurboError(
                f"calibration.max_divergence is {self.max_divergence}, but it must be above 0: with windows, answers "
                "always diverge a little."
            )
        if self.threshold is not None and self.count is not None:
            raise RTPurboError("choose retrieval heads by threshold or by count, not by both.")
        check_at_least(1, self, "length", "num_documents")
        check_at_least(0, self, "count", "top_p_sequences")
        check_choice("granularity", self.granularity, HeadGranularity)
        check_choice("ranking", self.ranking, Ranking)

    @property
    def may_exceed_ratio(self) -> bool:
        """True if more heads than `ratio` are chosen where answers diverge by more than `max_divergence`."""
        is_share = self.threshold is None and self.count is None
        return is_share and self.ranking == "gates" and self.max_divergence is not None


@dataclass(frozen=True)
class SequenceSettings:
    """Training data of a stage: a mixture of tasks, and prose for the rest.

    Attributes:
        lengths: tokens of a training sequence; sequences cycle through them.
        mixture: share of each task of `rtpurbo.data.tasks.TASKS` among the sequences; tasks that are left
            out have none.
        sequences_per_step: sequences of one optimiser step, over all processes; None is one for each
            process.
    """

    lengths: tuple[int, ...] = (2048, 4096, 8192)
    mixture: Mapping[str, float] = field(default_factory=lambda: {"needles": 0.5})
    sequences_per_step: int | None = None

    stage: ClassVar[str]
    """Stage that the settings belong to, by which `Task.stages` allows a task."""

    def resolved(self: StageSettings, num_processes: int) -> StageSettings:
        """Returns the settings with `sequences_per_step` set: one for each process where it is left open."""
        return replace(self, sequences_per_step=self.sequences_per_step or num_processes)

    @property
    def per_step(self) -> int:
        """Sequences of one optimiser step over all processes; needs resolved settings."""
        assert self.sequences_per_step is not None, "the settings are not resolved"
        return self.sequences_per_step


@dataclass(frozen=True)
class IndexerTrainingSettings(SequenceSettings):
    """Settings of stage 1: the indexers, on the frozen model. It has the attributes of `SequenceSettings` too.

    Attributes:
        steps: optimiser steps.
        steps_per_sequence: optimiser steps on one captured sequence, each with newly drawn queries; with 1
            no states are kept and each layer is trained during the forward pass, which long sequences need.
        queries_per_step: queries of a sequence and head that a step trains on; None is every query.
        answer_weight: weight of the mean loss of the queries that predict an answer, relative to that of
            the others; they are few, and every step includes all of them.
        learning_rate: peak learning rate of AdamW, after warm-up and before cosine decay.
        weight_decay: weight decay of AdamW.
        warmup_steps: steps of linear warm-up.
        init_sequences: sequences from whose second moments the indexers are initialised.
        probe_sequences: held-out sequences on which recall is measured.
        probe_every: steps between two measurements.
    """

    steps: int = 400
    steps_per_sequence: int = 8
    queries_per_step: int | None = 192
    answer_weight: float = 1.0
    learning_rate: float = 5e-3
    weight_decay: float = 0.01
    warmup_steps: int = 20
    init_sequences: int = 3
    probe_sequences: int = 2
    probe_every: int = 50

    stage: ClassVar[str] = "stage1"

    def __post_init__(self) -> None:
        _check_training(self)
        check_at_least(
            1, self, "steps_per_sequence", "queries_per_step", "init_sequences", "probe_sequences",
            "probe_every",
        )  # fmt: skip


@dataclass(frozen=True)
class DistillationSettings(SequenceSettings):
    """Settings of stage 2: the sparse student and the dense teacher. It has the attributes of `SequenceSettings` too.

    Attributes:
        steps: optimiser steps; 0 leaves stage 2 out. Three times as many moved the student away from the
            teacher on questions worded differently (docs/experiment-log.md).
        learning_rate: peak learning rate of AdamW, after warm-up and before cosine decay.
        weight_decay: weight decay of AdamW.
        warmup_steps: steps of linear warm-up.
        lora_rank: rank of the LoRA; 0 trains the full weights.
        lora_beyond_attention: also adapt the MLP's linear layers.
        lora_scale: factor at which the trained LoRA is applied, from 0 to 1; None finds the one at which
            held-out sequences diverge least from the dense model and no kind of them gets worse.
        top_logits: teacher logits kept for each target token (paper: 10).
        targets: target tokens: `answers`, tokens of answers only (prose, which has none, is treated as with
            `text`); `text`, tokens of the whole sequence; or `both`, every token of an answer and some of
            the text before it.
        targets_per_sequence: target tokens of a sequence, drawn at random; with `both`, this includes all
            answer tokens.
        answer_weight: weight of the mean loss of answer tokens, added to the mean over all targets.
        decode_queries: last queries of prose that select their keys as decode steps do; the queries
            that predict an answer always do, unless this is 0.
        gradient_checkpointing: recompute activations in the backward pass, on a GPU: less memory, a
            third more time.
        prefill_mode: attention of retrieval heads in training: `dense` as in the paper, or with the
            selection on.
        refresh_steps: steps of stage 1 on the student afterwards.
        checkpoint_every: steps between two checkpoints.
    """

    steps: int = 100
    lengths: tuple[int, ...] = (2048, 8192, 4096, 8192)
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    warmup_steps: int = 10
    lora_rank: int = 16
    lora_beyond_attention: bool = False
    lora_scale: float | None = 1.0
    top_logits: int = 10
    targets: Targets = "both"
    targets_per_sequence: int = 4096
    answer_weight: float = 1.0
    decode_queries: int = 256
    gradient_checkpointing: bool = True
    prefill_mode: PrefillMode = "dense"
    refresh_steps: int = 100
    checkpoint_every: int = 20

    stage: ClassVar[str] = "stage2"

    def __post_init__(self) -> None:
        _check_training(self)
        check_at_least(0, self, "lora_rank", "decode_queries", "refresh_steps")
        check_at_least(1, self, "checkpoint_every", "top_logits", "targets_per_sequence")
        check_choice("targets", self.targets, Targets)
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
    """Settings of streamed training texts.

    Attributes:
        enabled: read texts during training instead of into memory before it.
        buffer_size: documents shuffled at a time.
        held_out: documents at the beginning that are excluded from training; the same number after them
            is kept in memory, for calibration and the initialisation of the indexers.
    """

    enabled: bool = False
    buffer_size: int = 256
    held_out: int = 64

    def __post_init__(self) -> None:
        check_at_least(1, self, "buffer_size", "held_out")


@dataclass(frozen=True)
class ConversionSettings:
    """Settings of a conversion; `rtpurbo.conversion.defaults.default_settings` fits them to a model's context."""

    attention: AttentionRule = field(default_factory=AttentionRule)
    indexer: IndexerSettings = field(default_factory=IndexerSettings)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    stage1: IndexerTrainingSettings = field(default_factory=IndexerTrainingSettings)
    stage2: DistillationSettings = field(default_factory=DistillationSettings)
    stream: StreamSettings = field(default_factory=StreamSettings)
    seed: int = 0

    @property
    def refresh(self) -> IndexerTrainingSettings:
        """Settings of the refresh: stage 1 on the student, with fewer steps at half the learning rate."""
        steps = self.stage2.refresh_steps
        return replace(
            self.stage1,
            steps=steps,
            warmup_steps=min(self.stage1.warmup_steps, steps // 4),
            learning_rate=self.stage1.learning_rate / 2,
        )

    def resolved(self, num_processes: int) -> ConversionSettings:
        """Returns the settings with what depends on the number of processes set in every stage."""
        stages = {
            name: getattr(self, name).resolved(num_processes) for name in ("stage1", "stage2")
        }
        return replace(self, **stages)

    def to_dict(self) -> dict[str, Any]:
        """Returns the settings as plain JSON types."""
        return asdict(self)


def change_settings(settings: ConversionSettings, changes: Mapping[str, Any]) -> ConversionSettings:
    """Returns settings with some fields changed.

    Args:
        settings: settings to start from.
        changes: values by dotted name, such as `{"stage1.steps": 100, "seed": 1}`; the share of one task is
            `stage1.mixture.needles`. Former names (`RENAMED`) are accepted with a warning.

    Raises:
        RTPurboError: there is no such field, or its value is of the wrong type or out of range.
    """
    parts: dict[str, dict[str, Any]] = {}
    for given, given_value in changes.items():
        name, value = current_setting(given, given_value)
        part, item, task, checked = _change(settings, name, value)
        if name != given:
            logger.warning("The setting '%s' is now called '%s'.", given, name)
        elif value != given_value:
            logger.warning("The value '%s' of %s is now called '%s'.", given_value, name, value)
        changed = parts.setdefault(part, {})
        if task:
            checked = {**changed.get(item, getattr(_part(settings, part), item)), task: checked}
        changed[item] = checked
    settings = replace(settings, **parts.pop("", {}))
    # All fields of a part at once: intermediate states may be invalid.
    parts_changed = {part: replace(_part(settings, part), **items) for part, items in parts.items()}
    return replace(settings, **parts_changed)


def check_changes(changes: Mapping[str, Any]) -> None:
    """Checks names and types of changes for `change_settings`, before the settings to change are known.

    Raises:
        RTPurboError: there is no such field, or its value is of the wrong type.
    """
    for name, value in changes.items():
        _change(ConversionSettings(), *current_setting(name, value))


def _change(settings: ConversionSettings, name: str, value: Any) -> tuple[str, str, str, Any]:
    """Returns part, field, task and checked value of a change; part and task may be empty."""
    if name in REMOVED:
        raise RTPurboError(f"there is no setting '{name}' any more: {REMOVED[name]}.")
    path = name.split(".")
    part, item, *task = ["", *path] if len(path) == 1 else path
    owner = _part(settings, part)
    if item not in _names_of(owner) or len(task) > (item == "mixture"):
        raise RTPurboError(f"there is no setting '{name}'.")
    if not task:
        checked = checked_value(name, value, field_types(type(owner))[item])
        if item == "mixture":
            _check_tasks(name, owner, checked)
        return part, item, "", checked
    known = _tasks_of(owner)
    if task[0] not in known:
        raise RTPurboError(
            f"there is no setting '{name}': the tasks of {part} are {', '.join(known)}."
        )
    return part, item, task[0], checked_value(name, value, float)


def recorded_changes(recorded: Mapping[str, Any], *parts: str) -> dict[str, Any]:
    """Returns the changes that give parts of any settings the values of a record, such as an artifact's.

    `sequences_per_step` is left out, because it depends on the number of processes.

    Args:
        recorded: a result of `ConversionSettings.to_dict`, of this version or another, or an empty mapping.
        parts: names such as `stage1`.
    """
    changes = {}
    current = current_settings(recorded)
    for part in parts:
        owner = _part(ConversionSettings(), part)
        for name, value in current.get(part, {}).items():
            if name == "mixture":
                value = {task: value[task] for task in _tasks_of(owner) if task in value}
            if name in _names_of(owner) - {"sequences_per_step"}:
                changes[f"{part}.{name}"] = value
    return changes


def _tasks_of(settings: SequenceSettings) -> list[str]:
    """Returns the names of the tasks that a stage can train on."""
    return [name for name, task in TASKS.items() if settings.stage in task.stages]


def _check_tasks(name: str, settings: SequenceSettings, mixture: Mapping[str, float]) -> None:
    """Refuses a mixture with unknown tasks."""
    known = _tasks_of(settings)
    if not mixture.keys() <= set(known):
        raise RTPurboError(
            f"{name} is {dict(mixture)}, but it must be shares of these tasks: {', '.join(known)}."
        )


def _part(settings: ConversionSettings, name: str) -> Any:
    """Returns a part of the settings, or all of them for an empty name; None if there is no such part."""
    return getattr(settings, name) if name in _names_of(settings) else None if name else settings


def _names_of(settings: Any) -> set[str]:
    return {field.name for field in fields(settings)} if is_dataclass(settings) else set()


def _check_training(settings: IndexerTrainingSettings | DistillationSettings) -> None:
    check_at_least(0, settings, "steps")
    if not settings.lengths or min(settings.lengths) < 1:
        raise RTPurboError("training needs at least one sequence length, in tokens.")
    mixture = settings.mixture
    _check_tasks("mixture", settings, mixture)
    if min(mixture.values(), default=0) < 0 or sum(mixture.values()) > 1 + 1e-9:
        raise RTPurboError(
            f"mixture is {dict(mixture)}, but its shares must be at least 0 and at most 1 together."
        )
    # One form, whatever order it was written in: a task without a share is left out.
    used = {name: mixture[name] for name in TASKS if mixture.get(name)}
    object.__setattr__(settings, "mixture", used)
    check_at_least(0, settings, "learning_rate", "weight_decay", "warmup_steps", "answer_weight")
    if settings.sequences_per_step is not None and settings.sequences_per_step < 1:
        raise RTPurboError(
            f"sequences_per_step is {settings.sequences_per_step}, but a step needs at least one."
        )

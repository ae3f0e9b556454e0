"""Checks that the sequences of every stage fit the model's context and are longer than the window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rtpurbo.config import AttentionRule
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import ConversionSettings, IndexerTrainingSettings

Stage = Literal["calibration", "stage1", "stage2"]
STAGES: tuple[Stage, ...] = ("calibration", "stage1", "stage2")


def lengths_of(
    settings: ConversionSettings, stages: Sequence[Stage] = STAGES
) -> dict[Stage, tuple[int, ...]]:
    """Returns the sequence lengths of each stage that runs; a stage 2 without steps is left out."""
    lengths: dict[Stage, tuple[int, ...]] = {
        "calibration": (settings.calibration.length,),
        "stage1": settings.stage1.lengths,
    }
    if settings.stage2.steps:
        lengths["stage2"] = settings.stage2.lengths
    return {stage: lengths[stage] for stage in stages if stage in lengths}


def check_context(what: str, length: int, context_length: int) -> None:
    """Refuses sequences that are longer than the model's context.

    Args:
        what: name of the sequences, in the plural.
        length: tokens of the longest one.
        context_length: the model's context, in tokens.

    Raises:
        RTPurboError: the longest one does not fit.
    """
    if length > context_length:
        raise RTPurboError(
            f"{what} of {length:,} tokens do not fit the model's context of {context_length:,}: "
            "choose a shorter length."
        )


def check_lengths(
    settings: ConversionSettings, context_length: int, stages: Sequence[Stage] = STAGES
) -> None:
    """Refuses stages whose sequences do not fit the context or have no far tokens.

    Args:
        settings: settings of the conversion.
        context_length: the model's context, in tokens.
        stages: stages that will run.

    Raises:
        RTPurboError: a sequence is longer than the context, or not longer than sinks and window.
    """
    rule = settings.attention
    if "calibration" in stages:
        length = settings.calibration.length
        check_context("calibration documents (calibration.length)", length, context_length)
        # Up to this length a local head attends to the same keys as a retrieval head.
        reach = rule.sliding_window + rule.num_sink_tokens
        if length <= reach:
            raise _too_short("calibration needs documents", reach, "calibration.length", length)
    if "stage1" in stages:
        check_stage1_lengths(settings.stage1, context_length, rule)
    if "stage2" in stages and settings.stage2.steps:
        longest = max(settings.stage2.lengths)
        check_context("sequences of stage 2 (stage2.lengths)", longest, context_length)
        # Only the longest is checked: short sequences keep the student close to the teacher at short lengths.
        reach = min(rule.near_window, rule.sliding_window) + rule.num_sink_tokens
        if longest <= reach:
            raise _too_short("stage 2 needs sequences", reach, "stage2.lengths", longest)


def check_stage1_lengths(
    settings: IndexerTrainingSettings, context_length: int, rule: AttentionRule
) -> None:
    """Checks that every sequence of stage 1 fits the context and has far tokens to select from.

    Raises:
        RTPurboError: a length is out of range.
    """
    check_context("sequences of stage 1 (stage1.lengths)", max(settings.lengths), context_length)
    reach = rule.near_window + rule.num_sink_tokens
    if min(settings.lengths) <= reach:
        raise _too_short("stage 1 needs sequences", reach, "stage1.lengths", min(settings.lengths))


def _too_short(needs: str, reach: int, name: str, length: int) -> RTPurboError:
    return RTPurboError(
        f"{needs} longer than sinks and window ({reach:,} tokens), but {name} has {length:,}: "
        f"raise --max-length or --set {name}, or choose a smaller --window."
    )

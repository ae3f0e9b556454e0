"""Default settings of a conversion by effort and context of the model."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from rtpurbo.config import AttentionRule, IndexerSettings, default_sliding_window
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import (
    CalibrationSettings,
    ConversionSettings,
    DistillationSettings,
    IndexerTrainingSettings,
)

Effort = Literal["quick", "standard", "thorough"]
EFFORTS: tuple[Effort, ...] = ("quick", "standard", "thorough")

_LONGEST: dict[Effort, tuple[int, int]] = {
    "quick": (0, 2),
    "standard": (32768, 4),
    "thorough": (65536, 8),
}
"""Longest training sequence: at least the first number of tokens, and at least the second number of windows."""

_KEPT: dict[str, Any] = {
    "ranking": "gates",
    "granularity": "kv_group",
    "ratio": 0.4,
    "max_divergence": 0.0047,
}
"""Choice of full KV heads, each with all of its query heads: 40 %, or more for models that need more.

With 30 % of the KV heads a fifth of the answers about UUIDs at 16K are not those of Qwen2.5-Coder-1.5B, with 40 % a
twentieth (docs/experiment-log.md). Answers of calibration then diverge by .0051 nats, and by .0044 with 48 %; the limit
lies between the two. On the 0.5B model they diverge by .0013 with 40 %, and by .15 with one of the three KV heads of
Gemma 3 270M, which misses half of its needles.
"""

_SINKS_OF_WINDOW = 32
"""Window tokens for each sink: 128 sinks instead of 4 reduced the loss by a tenth (docs/experiment-log.md)."""

_HEAVY_HITTERS_OF_WINDOW = 4
"""Window tokens for each heavy hitter, which takes the place of one of them in the cache.

With half of the window's tokens, answers of Qwen2.5-Coder-1.5B at 16K diverge less than with an eighth
(docs/experiment-log.md); a quarter keeps more of the last tokens.
"""

_MIN_TOKENS_OF_WINDOW = 8
"""Window tokens for each far token that a query reads at least, but not fewer than the rule's own minimum.

With 512 in place of 128 at a context of 32K, Qwen2.5-Coder-0.5B loses .6 points of RULER at 16K in place of 1.4, and
on Qwen2.5-Coder-1.5B UUIDs and frequent words lose less (docs/experiment-log.md).
"""

_DENSE_PROMPT_TOKENS = 32768
"""Length of prompts that lose nothing before the answer begins.

Windows in the prompt lost keys among keys on Qwen2.5-Coder-0.5B at 16K, and questions after the text on
Qwen2.5-Coder-1.5B at 32K (docs/experiment-log.md).
"""

_QUICK_DENSE_QUERIES = 512
"""Dense queries at the end of a prompt with `quick`."""

_TOP_P = 0.93
"""Qwen2.5-Coder-1.5B reads 7.7 % of its far tokens at 32K with it, and the 0.5B model 5.3 %."""

_LONG_RANGE = {
    "needles": 0.1,
    "variables": 0.15,
    "passage": 0.05,
    "haystack": 0.3,
    "counting": 0.1,
    "reading": 0.1,
}
"""Mixture of stage 1: mostly sequences whose answers depend on distant tokens."""

_DISTILLED = {
    "needles": 0.06,
    "variables": 0.08,
    "passage": 0.03,
    "haystack": 0.14,
    "counting": 0.08,
    "reading": 0.08,
    "documents": 0.12,
    "conversations": 0.31,
}
"""Mixture of stage 2: also sequences written by the dense model, so that short conversations do not get worse.

On Qwen2.5-Coder-1.5B stage 2 did not reduce the divergence at 32K, so only `thorough` includes it, at a LoRA scale
at which no kind of sequence gets worse, which may be 0 (docs/experiment-log.md).
"""

_UNTRAINED = IndexerTrainingSettings(steps=0, learning_rate=1e-3, mixture=_LONG_RANGE)
"""Stage 1 that only initialises the index.

With 16 dimensions training reduced the divergence of answers by up to 24 times, with the dimensions of
`default_indexer` by nothing at the same number of tokens read. The learning rate is for the refresh, which halves it,
and for steps that are asked for: at 5e-3 the loss of Qwen2.5-Coder-1.5B rose with 32 dimensions
(docs/experiment-log.md).
"""

_STAGES: dict[Effort, ConversionSettings] = {
    "quick": ConversionSettings(
        calibration=CalibrationSettings(num_documents=3),
        stage1=IndexerTrainingSettings(
            steps=60, steps_per_sequence=15, queries_per_step=128, warmup_steps=5,
            init_sequences=2, probe_sequences=2, probe_every=30,
        ),
        stage2=DistillationSettings(
            steps=8, targets_per_sequence=512, warmup_steps=2, lora_rank=8, refresh_steps=15,
            checkpoint_every=4,
        ),
    ),
    "standard": ConversionSettings(
        calibration=CalibrationSettings(num_documents=150, top_p_sequences=12, **_KEPT),
        stage1=_UNTRAINED,
        stage2=DistillationSettings(
            steps=0, refresh_steps=100, mixture=_DISTILLED, lora_scale=None
        ),
    ),
    "thorough": ConversionSettings(
        calibration=CalibrationSettings(num_documents=300, top_p_sequences=12, **_KEPT),
        stage1=_UNTRAINED,
        stage2=DistillationSettings(
            steps=200, refresh_steps=200, mixture=_DISTILLED, lora_scale=None
        ),
    ),
}  # fmt: skip
"""Steps and sizes of each effort; `default_settings` adds lengths and window."""


def resolve_effort(name: str, device_type: str) -> Effort:
    """Returns the effort of a name; `auto` is `quick` on a CPU and `standard` on a GPU.

    Args:
        name: `auto` or one of `EFFORTS`.
        device_type: such as `cpu` or `cuda`.

    Raises:
        RTPurboError: there is no such effort.
    """
    if name == "auto":
        return "quick" if device_type == "cpu" else "standard"
    for effort in EFFORTS:
        if name == effort:
            return effort
    raise RTPurboError(f"there is no effort '{name}': choose auto, {', '.join(EFFORTS)}.")


def default_rule(effort: Effort, context_length: int) -> AttentionRule:
    """Returns the rule for a model of this context: windows, minimum, dense prompts, heavy hitters, index storage."""
    window = default_sliding_window(context_length)
    if effort == "quick":
        return AttentionRule(sliding_window=window, dense_prompt_queries=_QUICK_DENSE_QUERIES)
    heavy_hitters = window // _HEAVY_HITTERS_OF_WINDOW
    return AttentionRule(
        top_p=_TOP_P,
        min_tokens=max(AttentionRule.min_tokens, window // _MIN_TOKENS_OF_WINDOW),
        dense_prompt_tokens=_DENSE_PROMPT_TOKENS,
        num_sink_tokens=window // _SINKS_OF_WINDOW + heavy_hitters,
        num_heavy_hitters=heavy_hitters,
        sliding_window=window - heavy_hitters,
        index_storage="float8",
    )


def default_indexer(effort: Effort, head_dim: int, context_length: int) -> IndexerSettings:
    """Returns the index keys' settings.

    Except with `quick`, whole KV groups are retrieval heads, and one index key serves all query heads of a KV head.
    It has three eighths of the head's dimensions, rounded up to a multiple of 16 and at most 64, from the rotary
    pairs that do not complete a turn within an eighth of the context. With a quarter of the dimensions, from the
    pairs that complete none within the whole context, answers of Qwen2.5-Coder-0.5B diverge 2 to 70 times as much,
    by task (docs/experiment-log.md).

    Args:
        effort: of the conversion.
        head_dim: dimensions of a head.
        context_length: the model's context, in tokens.
    """
    if effort == "quick":
        return IndexerSettings()
    return IndexerSettings(
        shared_keys=True,
        index_dim=min(64, 16 * math.ceil(head_dim * 3 / 8 / 16)),
        min_wavelength=context_length / 8,
    )


def default_settings(
    effort: Effort,
    context_length: int,
    *,
    head_dim: int = 128,
    max_length: int | None = None,
    rule: AttentionRule | None = None,
) -> ConversionSettings:
    """Returns settings for a model of this context: window, lengths and steps of every stage.

    Sequences of both stages range from twice the window to `max_length`, by powers of two; every other sequence of
    stage 2 has the longest length. Calibration documents are half as long as the longest sequence, and at least
    two windows.

    Args:
        effort: `quick` for minutes on two CPU cores, `standard` for one GPU, or `thorough` with more steps, longer
            sequences and stage 2.
        context_length: the model's context, in tokens.
        head_dim: dimensions of a head.
        max_length: tokens of the longest training sequence. None is two windows with `quick`, 32,768 or four windows
            with `standard`, and 65,536 or eight windows with `thorough`, whichever is more, but at most the context.
        rule: attention rule, whose window determines the lengths. None is `default_rule`.

    Raises:
        RTPurboError: the context is too short for the window, or `max_length` is not between the window and the
            context.
    """
    if rule is None:
        rule = default_rule(effort, context_length)
    window, near = rule.sliding_window, rule.sliding_window + rule.num_sink_tokens
    # A query always selects `min_tokens` far tokens, so with no more than these attention is dense.
    if context_length <= near + rule.min_tokens:
        raise RTPurboError(
            f"a context of {context_length:,} tokens leaves nothing to select beyond a window of "
            f"{window:,} and {rule.num_sink_tokens} sinks: choose a model with a longer context or "
            "a smaller --window."
        )
    at_least, windows = _LONGEST[effort]
    if max_length is None:
        max_length = min(max(at_least, windows * window), context_length)
    elif max_length > context_length:
        raise RTPurboError(
            f"--max-length is {max_length:,} tokens, but the model's context is "
            f"{context_length:,}: choose a shorter one."
        )
    elif max_length <= near:
        raise RTPurboError(
            f"--max-length is {max_length:,} tokens, but training needs sequences longer than "
            f"sinks and window ({near:,} tokens): raise it or choose a smaller --window."
        )
    lengths = _halvings(max_length, 2 * window)
    stages = _STAGES[effort]
    return replace(
        stages,
        attention=rule,
        indexer=default_indexer(effort, head_dim, context_length),
        calibration=replace(
            stages.calibration, length=min(max_length, max(2 * window, max_length // 2))
        ),
        stage1=replace(stages.stage1, lengths=lengths),
        stage2=replace(stages.stage2, lengths=_with_last_between(lengths)),
    )


def _halvings(longest: int, shortest: int) -> tuple[int, ...]:
    """Returns the longest length and its halves down to the shortest, in ascending order."""
    lengths = [longest]
    while lengths[0] // 2 >= shortest:
        lengths.insert(0, lengths[0] // 2)
    return tuple(lengths)


def _with_last_between(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Returns (a, b, c) as (a, c, b, c), so that half of the sequences have the last length."""
    if len(lengths) == 1:
        return lengths
    return tuple(length for shorter in lengths[:-1] for length in (shorter, lengths[-1]))

"""lm-eval's results as outcomes: a score from 0 to 100 with its interval, for each metric."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from transformers import PreTrainedTokenizerBase

from rtpurbo.evaluation.bootstrap import bootstrap_interval
from rtpurbo.evaluation.samples import Outcome, Sample

# Value of RULER's tasks in lm-eval for lengths other than a sample's own.
OTHER_LENGTH = -1.0


def outcomes_of(
    samples: Sequence[Mapping[str, Any]],
    aggregated: Mapping[str, Any],
    higher_is_better: Mapping[str, bool],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Outcome]:
    """Returns the outcomes of a task from lm-eval's log of each question and its results by `metric,filter`.

    The tokenizer counts the tokens of prompts.
    """
    outcomes = []
    for key in _measured(samples):
        metric, chosen = key
        own = [sample for sample in samples if sample["filter"] == chosen and metric in sample]
        values = [sample[metric] for sample in own]
        # RULER's tasks name their metric by the length.
        name = "string_match" if metric.isdigit() else metric
        name = name if chosen == "none" else f"{name},{chosen}"
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        if len(numbers) < len(values):
            # Such as word perplexity, which is not a mean over samples.
            score = aggregated.get(f"{metric},{chosen}")
            if isinstance(score, int | float):
                outcomes.append(Outcome(float(score), None, len(values), (), name))
            continue
        if metric.isdigit():
            pairs = zip(own, numbers, strict=True)
            own = [sample for sample, number in pairs if number != OTHER_LENGTH]
            numbers = [number for number in numbers if number != OTHER_LENGTH]
        if not numbers:
            continue
        # lm-eval does not say which metrics are shares: one that is better if higher and never above 1 is
        # treated as a share.
        is_share = higher_is_better.get(metric, True) and all(0 <= item <= 1 for item in numbers)
        scores = [100 * number if is_share else number for number in numbers]
        kept = tuple(
            _sample(sample, score, tokenizer) for sample, score in zip(own, scores, strict=True)
        )
        outcomes.append(Outcome(fmean(scores), bootstrap_interval(scores), len(scores), kept, name))
    return outcomes


def _measured(samples: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yields each metric with its filter of answers, in lm-eval's order."""
    pairs = [(metric, sample["filter"]) for sample in samples for metric in sample["metrics"]]
    yield from dict.fromkeys(pairs)


def _sample(sample: Mapping[str, Any], score: float, tokenizer: PreTrainedTokenizerBase) -> Sample:
    context = str(sample["arguments"][0][0])
    ids = tokenizer(context, add_special_tokens=False, verbose=False)["input_ids"]
    target = sample["target"]
    targets = target if isinstance(target, list) else [target]
    answered = sample["resps"][0]
    while isinstance(answered, list | tuple) and answered:
        answered = answered[0]
    return Sample.of(ids, [str(item) for item in targets], str(answered), score)

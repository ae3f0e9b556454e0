"""Heading, opening sentence and headline figures of a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rtpurbo.evaluation.policies import DENSE_POLICY
from rtpurbo.evaluation.records import Record
from rtpurbo.formats import percent, short_length
from rtpurbo.reporting.html.policies import main_policy
from rtpurbo.reporting.html.sections.memory import cache_ratio
from rtpurbo.reporting.html.sections.speed import best_decode
from rtpurbo.reporting.html.sources import Sources
from rtpurbo.reporting.model_card import base_name, local_heads
from rtpurbo.reporting.selection import far_share, lengths_of, pick


@dataclass(frozen=True)
class Headline:
    """A headline figure.

    Attributes:
        value: the number.
        label: its meaning, below it.
    """

    value: str
    label: str


def headlines(sources: Sources) -> list[Headline]:
    """Returns the headline figures."""
    return [*_of_heads(sources), *_of_quality(sources), *_of_speed(sources)]


def title_of(sources: Sources) -> str:
    """Returns the heading: the base model's public name, else the artifact's name in the results."""
    if sources.artifact is not None and not sources.artifact.base.is_local:
        return f"{_base(sources).split()[0].split('/')[-1]}, sparse"
    models = {Path(quality.model).name for quality in sources.quality}
    if len(models) == 1:
        return models.pop()
    return "rtpurbo" if sources.artifact is None else "A local model, sparse"


def _base(sources: Sources) -> str:
    assert sources.artifact is not None
    base = sources.artifact.base
    return base.public_name if base.source == "wheel" else base_name(sources.artifact)


def opening(sources: Sources) -> str:
    """Returns the sentence below the heading."""
    if sources.artifact is None:
        return (
            "Measurements of models converted by RTPurbo: a few retrieval heads attend to the whole "
            "context, all other heads to a sliding window."
        )
    head_map, rule = sources.artifact.config.head_map, sources.artifact.config.attention
    share = percent(head_map.num_retrieval_heads / max(1, head_map.num_heads))
    base = _base(sources)
    return (
        f"{base[0].upper()}{base[1:]}, converted by RTPurbo: {head_map.num_retrieval_heads} of its "
        f"{head_map.num_heads} attention heads ({share}) are retrieval heads, which select tokens "
        "anywhere in the context by a token indexer of "
        f"{sources.artifact.config.indexer.index_dim} dimensions; all other heads {local_heads(rule)}."
    )


def _of_heads(sources: Sources) -> list[Headline]:
    if sources.artifact is None:
        return []
    head_map = sources.artifact.config.head_map
    value = f"{head_map.num_retrieval_heads} of {head_map.num_heads}"
    return [Headline(value, "attention heads are retrieval heads")]


def _of_quality(sources: Sources) -> list[Headline]:
    if len(sources.quality) != 1:  # of several models, none is the one
        return []
    quality = sources.quality[0]
    policy = main_policy(quality.records)
    if policy is None:
        return []
    figures = []
    ruler = _longest(pick(quality.records, suite="ruler"))
    asked = ruler or [r for r in quality.records if r.suite not in ("ruler", "perplexity")]
    if means := _means(asked, policy):
        sparse, dense, count, samples = means
        where = f"RULER at {_length(ruler)}" if ruler else "all questions"
        tests = f"{count} tests" if count > 1 else "one test"
        label = f"right answers, dense {dense:.1f} % ({where}, {tests}, {samples} samples)"
        figures.append(Headline(f"{sparse:.1f} %", label))
    prose = _longest(pick(quality.records, suite="perplexity"))
    if means := _means(prose, policy):
        sparse, dense, *_ = means
        label = f"perplexity at {_length(prose)}: {sparse:.2f}, dense {dense:.2f}"
        figures.append(Headline(f"{100 * (sparse / dense - 1):+.1f} %", label))
    longest = _longest(pick(quality.records, policy=policy))
    far = far_share(longest, policy)
    if far is not None:
        label = f"of the far tokens read by retrieval heads at {_length(longest)}"
        figures.append(Headline(percent(far), label))
    ratio = cache_ratio(quality, policy)
    if ratio is not None:
        size, length = ratio
        figures.append(Headline(f"{size:.2f}x", f"the dense KV cache at {short_length(length)}"))
    return figures


def _longest(records: list[Record]) -> list[Record]:
    return pick(records, context_length=lengths_of(records)[-1]) if records else []


def _length(records: list[Record]) -> str:
    return short_length(records[0].context_length)


def _means(records: list[Record], policy: str) -> tuple[float, float, int, int] | None:
    """Mean scores of a policy and the dense model over tests that both have, their number and samples."""
    found = {
        name: {(r.suite, r.task, r.metric, r.context_length): r for r in pick(records, policy=name)}
        for name in (policy, DENSE_POLICY)
    }
    both = found[policy].keys() & found[DENSE_POLICY].keys()
    if not both:
        return None
    sparse, dense = (
        fmean(found[name][test].score for test in both) for name in (policy, DENSE_POLICY)
    )
    return sparse, dense, len(both), sum(found[policy][test].samples for test in both)


def _of_speed(sources: Sources) -> list[Headline]:
    # Benchmarks force the density of random weights: on a model's page, that is not its speed.
    if sources.artifact is not None or sources.quality:
        return []
    best = best_decode(sources)
    if best is None:
        return []
    ratio, record, origin = best
    shape = record.model or "one layer"
    density = f"forced density {percent(record.density)}, " if record.density < 1 else ""
    where = (
        f"{shape}, random weights, {density}{short_length(record.context_length)}, {origin.device}"
    )
    return [Headline(f"{ratio:.1f}x", f"the decoding speed of the best dense kernel ({where})")]

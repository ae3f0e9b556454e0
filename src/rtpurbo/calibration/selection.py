"""Selection of retrieval heads from their scores, and its stability over documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, combinations

import torch
from torch import Tensor

from rtpurbo.config import HeadCounts, HeadMap
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import CalibrationSettings

Scores = Sequence[Sequence[float] | None]


def choose_heads(
    scores: Scores, num_key_value_heads: HeadCounts, settings: CalibrationSettings
) -> HeadMap:
    """Ranks all heads of all layers together and takes the best.

    With `kv_group` granularity a group ranks by its best head and is taken whole, until as many heads as asked for
    are covered (the last group may bring a few more).

    Args:
        scores: for each layer, a score for each query head; None for a layer that is not converted.
        num_key_value_heads: KV heads of a layer, as in a head map.
        settings: ratio, threshold or count; granularity.

    Raises:
        RTPurboError: more heads are asked for than there are, or none is left.
    """
    # Without retrieval heads, for the numbers of heads of each layer.
    empty = HeadMap(
        tuple(None if row is None else () for row in scores),
        tuple(None if row is None else len(row) for row in scores),
        num_key_value_heads,
        tuple(None if row is None else tuple(float(value) for value in row) for row in scores),
        settings.granularity,
    )
    # Layer and heads of each unit, best first; ties go to the earlier layer and head.
    units: list[tuple[int, range]] = []
    for layer in empty.converted_layers:
        size = empty.group_size(layer) if settings.granularity == "kv_group" else 1
        firsts = range(0, empty.num_query_heads(layer), size)
        units += [(layer, range(first, first + size)) for first in firsts]

    def score(unit: tuple[int, range]) -> float:
        layer, heads = unit
        row = scores[layer]
        assert row is not None
        return max(row[head] for head in heads)

    units.sort(key=score, reverse=True)
    if settings.threshold is not None:
        taken = [unit for unit in units if score(unit) >= settings.threshold]
    else:
        total = empty.num_heads
        wanted = settings.count if settings.count is not None else math.ceil(settings.ratio * total)
        if not 0 <= wanted <= total:
            raise RTPurboError(
                f"{wanted} retrieval heads were asked for, but the model has {total} query heads."
            )
        before = accumulate((len(heads) for _, heads in units), initial=0)
        taken = [unit for unit, heads in zip(units, before, strict=False) if heads < wanted]
    chosen: dict[int, list[int]] = {layer: [] for layer in empty.converted_layers}
    for layer, heads in taken:
        chosen[layer] += heads
    return replace(
        empty,
        retrieval_heads=tuple(
            None if row is None else tuple(sorted(chosen[layer]))
            for layer, row in enumerate(scores)
        ),
    )


def in_turn(first: Tensor, second: Tensor) -> Tensor:
    """Scores by which the best heads of two rankings come in turn.

    Args:
        first: scores of all heads, of which the best head comes first.
        second: of the same shape.

    Returns:
        1 for the best head, then less the worse the better of a head's two ranks is; of the same shape.
    """
    places = []
    for turn, scores in enumerate((first, second)):
        best_first = scores.flatten().argsort(descending=True, stable=True)
        places.append(2 * best_first.argsort() + turn)
    return (1 - torch.minimum(*places) / (2 * first.numel())).view_as(first)


@dataclass(frozen=True)
class Stability:
    """Agreement between documents, as means over all pairs of them.

    Attributes:
        rank_correlation: Spearman's, over all heads' scores; 1 is full agreement.
        overlap: share of the top heads that two documents have in common.
        num_top_heads: how many heads count as top.
        num_documents: documents compared.
    """

    rank_correlation: float
    overlap: float
    num_top_heads: int
    num_documents: int


def measure_stability(scores: Tensor, num_top_heads: int) -> Stability | None:
    """Agreement of documents on the scores [documents, heads]; None for a single document."""
    pairs = list(combinations(range(scores.shape[0]), 2))
    if not pairs:
        return None
    ranks = scores.argsort(dim=-1).argsort(dim=-1).double()
    correlations = torch.corrcoef(ranks)
    tops = [set(row.topk(num_top_heads).indices.tolist()) for row in scores]
    overlaps = [len(tops[a] & tops[b]) / max(1, num_top_heads) for a, b in pairs]
    return Stability(
        sum(float(correlations[a, b]) for a, b in pairs) / len(pairs),
        sum(overlaps) / len(overlaps),
        num_top_heads,
        scores.shape[0],
    )

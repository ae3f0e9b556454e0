"""Selection of retrieval heads from their scores, and its stability over documents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from rtpurbo.config import HeadMap
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import CalibrationSettings

Scores = Sequence[Sequence[float] | None]


def choose_heads(
    scores: Scores, num_key_value_heads: int, settings: CalibrationSettings
) -> HeadMap:
    """Ranks all heads of all layers together and takes the best.

    With `kv_group` granularity a group ranks by its best head and is taken whole, until as many heads as asked for
    are covered (the last group may bring a few more).

    Args:
        scores: for each layer, a score for each query head; None for a layer that is not converted.
        num_key_value_heads: KV heads of a layer.
        settings: ratio, threshold or count; granularity.

    Raises:
        RTPurboError: more heads are asked for than there are, or none is left.
    """
    num_heads = len(next(row for row in scores if row is not None))
    unit = num_heads // num_key_value_heads if settings.granularity == "kv_group" else 1
    # (score of the unit, layer, first head), best first; ties go to the earlier layer and head.
    units = [
        (max(row[first : first + unit]), layer, first)
        for layer, row in enumerate(scores)
        if row is not None
        for first in range(0, num_heads, unit)
    ]
    units.sort(key=lambda item: (-item[0], item[1], item[2]))
    total = unit * len(units)
    if settings.threshold is not None:
        taken = [item for item in units if item[0] >= settings.threshold]
    else:
        wanted = settings.count if settings.count is not None else math.ceil(settings.ratio * total)
        if not 0 <= wanted <= total:
            raise RTPurboError(
                f"{wanted} retrieval heads were asked for, but the model has {total} query heads."
            )
        taken = units[: -(-wanted // unit)]
    chosen: list[list[int] | None] = [None if row is None else [] for row in scores]
    for _, layer, first in taken:
        heads = chosen[layer]
        assert heads is not None
        heads.extend(range(first, first + unit))
    return HeadMap(
        tuple(None if heads is None else tuple(sorted(heads)) for heads in chosen),
        num_heads,
        num_key_value_heads,
        tuple(None if row is None else tuple(float(value) for value in row) for row in scores),
        settings.granularity,
    )


def in_turn(first: Tensor, second: Tensor) -> Tensor:
    """Scores by which the best heads of two rankings come in turn.

    Args:
        first: [layers, heads], of which the best head comes first.
        second: of the same shape.

    Returns:
        1 for the best head, then less the worse the better of a head's two ranks is; [layers, heads].
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

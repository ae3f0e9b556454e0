"""Other ways to take retrieval heads than one ranking of all heads."""

from __future__ import annotations

from dataclasses import replace

from ablations.arms import HeadChoice
from rtpurbo.calibration.selection import Scores, choose_heads
from rtpurbo.config import HeadCounts, HeadMap
from rtpurbo.evaluation.policies.random_heads import random_head_map
from rtpurbo.settings import CalibrationSettings


def chosen_map(
    scores: Scores,
    num_key_value_heads: HeadCounts,
    settings: CalibrationSettings,
    choice: HeadChoice,
    seed: int,
) -> HeadMap:
    """The head map that a choice makes of some scores.

    Args:
        scores: for each layer, a score for each query head; None for a layer that is not converted.
        num_key_value_heads: KV heads of a layer, as in a head map.
        settings: how many heads, and by what granularity.
        choice: `global` is the library's own, and so is `divergence`, of other scores; `per_layer` gives
            every layer the same number of heads, as far as it comes out even; `random` draws them, in
            the layers that `global` takes from; `kv_group_same_memory` takes whole groups, as many as
            `global` keeps whole KV heads.
        seed: of `random`.
    """
    best = choose_heads(scores, num_key_value_heads, settings)
    if choice == "per_layer":
        return replace(best, retrieval_heads=even_quota(scores, best.num_retrieval_heads))
    if choice == "random":
        return random_head_map(best, seed)
    if choice == "kv_group_same_memory":
        count = sum(
            best.group_size(layer) * len(best.full_key_value_heads(layer))
            for layer in best.converted_layers
        )
        whole = replace(settings, granularity="kv_group", threshold=None, count=count)
        return choose_heads(scores, num_key_value_heads, whole)
    return best


def even_quota(scores: Scores, count: int) -> tuple[tuple[int, ...] | None, ...]:
    """So many heads, every layer's best first, then every layer's second, and so on.

    Where a round is not filled, those of higher score are in it.
    """
    ranked = []
    for layer, row in enumerate(scores):
        best_first = sorted(range(len(row or ())), key=lambda head: -row[head])  # type: ignore[index]
        ranked += [
            (rank, -row[head], layer, head)  # type: ignore[index]
            for rank, head in enumerate(best_first)
        ]
    taken = sorted(ranked)[:count]
    return tuple(
        None if row is None else tuple(sorted(head for *_, own, head in taken if own == layer))
        for layer, row in enumerate(scores)
    )

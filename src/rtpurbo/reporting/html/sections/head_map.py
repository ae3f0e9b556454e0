"""Head map: one square for each head, stronger where its retrieval score is higher."""

from __future__ import annotations

from rtpurbo.config import HeadMap
from rtpurbo.formats import percent
from rtpurbo.reporting.figures import heat_map
from rtpurbo.reporting.headmap import score_level
from rtpurbo.reporting.html.sources import Sources
from rtpurbo.reporting.html.view import (
    NOTHING,
    Block,
    Cell,
    Folded,
    HeatMap,
    Missing,
    Section,
    Table,
    Text,
)
from rtpurbo.reporting.svg import Mark

_TITLE = "Retrieval heads"


def head_map_section(sources: Sources) -> Section | Missing:
    """Returns the map as a picture and as a table."""
    if sources.artifact is None:
        return Missing(_TITLE, "no artifact was given.")
    head_map = sources.artifact.config.head_map
    share = percent(head_map.num_retrieval_heads / max(1, head_map.num_heads))
    blocks: list[Block] = [
        Text(
            f"{head_map.num_retrieval_heads} of {head_map.num_heads} query heads ({share}) are "
            "retrieval heads, which attend to the whole context. Each square is a query head, layers "
            "from left to right; a stronger colour is a higher retrieval score in calibration. "
            "Retrieval heads have a frame and a dot. Point at a head, or tap it, for its score."
        ),
        _picture(head_map),
        Folded("All scores as a table", _table(head_map)),
    ]
    stability = sources.artifact.figures.get("stability") or {}
    if isinstance(stability, dict) and "overlap" in stability:
        blocks.append(
            Text(
                f"Two calibration documents agree on {percent(stability['overlap'])} of the "
                f"{stability['num_top_heads']} best heads, on average over pairs of "
                f"{stability['num_documents']} documents "
                f"(rank correlation of all scores {stability['rank_correlation']:.2f})."
            )
        )
    return Section("heads", _TITLE, blocks)


def _picture(head_map: HeadMap) -> HeatMap:
    best = max((max(row) for row in head_map.scores if row), default=0.0)
    levels: list[list[float | None]] = []
    marks: list[list[Mark]] = []
    framed: list[tuple[int, int]] = []
    most = _most_heads(head_map)
    for layer, chosen in enumerate(head_map.retrieval_heads):
        heads = range(head_map.num_query_heads(layer) or most)
        scores = [_score(head_map, layer, head) for head in heads]
        if chosen is None:
            levels.append([None for _ in heads])
            hint = f"layer {layer}, head {{}}: has a window of its own, not converted"
            marks.append([Mark(hint.format(head), "mark as-is") for head in heads])
            continue
        levels.append([score_level(score, best) for score in scores])
        marks.append(
            [
                Mark(
                    f"layer {layer}, head {head}: "
                    f"{'no score known' if score is None else f'score {score:.3f}'}, "
                    f"{'retrieval head' if head in chosen else 'local head'}",
                    "mark head retrieval" if head in chosen else "mark head",
                )
                for head, score in zip(heads, scores, strict=True)
            ]
        )
        framed += [(layer, head) for head in chosen]
    listed = "; ".join(
        f"layer {layer}: {', '.join(map(str, heads))}"
        for layer, heads in enumerate(head_map.retrieval_heads)
        if heads
    )
    said = f"Head map by layer and head. Retrieval heads: {listed or 'none'}. Scores: table below."
    drawing, width = heat_map(levels, marks, framed, said, ("layer", "head"))
    return HeatMap("Head map", drawing, width)


def _table(head_map: HeadMap) -> Table:
    rows: list[list[str | Cell]] = []
    most = _most_heads(head_map)
    for layer, chosen in enumerate(head_map.retrieval_heads):
        cells = []
        for head in range(most):
            score = _score(head_map, layer, head)
            written = NOTHING if score is None else f"{score:.3f}"
            retrieves = chosen is not None and head in chosen
            text = "not converted" if chosen is None else f"● {written}" if retrieves else written
            cells.append(Cell(text, bold=retrieves))
        rows.append([f"layer {layer}", *cells])
    header = ("", *(f"head {head}" for head in range(most)))
    return Table("Retrieval scores of all heads; ● and bold: retrieval head", header, rows)


def _most_heads(head_map: HeadMap) -> int:
    """Returns the largest number of query heads of a layer."""
    return max(map(head_map.num_query_heads, range(len(head_map.retrieval_heads))), default=0)


def _score(head_map: HeadMap, layer: int, head: int) -> float | None:
    scores = head_map.scores[layer] if layer < len(head_map.scores) else None
    return scores[head] if scores and head < len(scores) else None

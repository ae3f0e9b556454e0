"""The head map: a square for each head, darker where it retrieves more."""

from __future__ import annotations

from rtpurbo.config import HeadMap
from rtpurbo.formats import percent
from rtpurbo.reporting.html.markup import Markup, join, tag
from rtpurbo.reporting.html.sections.section import Missing, Section
from rtpurbo.reporting.html.sources import Sources
from rtpurbo.reporting.html.svg import picture, text
from rtpurbo.reporting.html.tables import NOTHING, cell, folded, paragraph, table

_TITLE = "Which heads retrieve"
_CELL, _LEFT, _TOP, _BOTTOM = 14.0, 34.0, 8.0, 34.0


def head_map_section(sources: Sources) -> Section | Missing:
    """The map as a picture and as a table."""
    if sources.artifact is None:
        return Missing(_TITLE, "no artifact was given.")
    head_map = sources.artifact.config.head_map
    share = percent(head_map.num_retrieval_heads / max(1, head_map.num_heads))
    body = [
        paragraph(
            f"{head_map.num_retrieval_heads} of {head_map.num_heads} query heads ({share}) can look "
            "anywhere in the context. Each square is a head, layers from left to right; the "
            "stronger its colour, the higher the head's retrieval score in calibration. Retrieval heads have a "
            "frame and a dot. Point at one, or tap it, for its score.",
        ),
        tag(
            "div",
            _picture(head_map),
            class_="scroll map",
            tabindex="0",
            role="region",
            aria_label="Head map",
        ),
        folded("The same as a table", _table(head_map)),
    ]
    stability = sources.artifact.figures.get("stability") or {}
    if isinstance(stability, dict) and "overlap" in stability:
        body.append(
            paragraph(
                f"Two calibration documents agree on {percent(stability['overlap'])} of the "
                f"{stability['num_top_heads']} best heads, on the mean over pairs of "
                f"{stability['num_documents']} documents "
                f"(rank correlation of all scores {stability['rank_correlation']:.2f})."
            )
        )
    return Section("heads", _TITLE, join(body))


def _picture(head_map: HeadMap) -> Markup:
    layers, heads = len(head_map.retrieval_heads), head_map.num_attention_heads
    best = max((max(row) for row in head_map.scores if row), default=0.0)
    shapes: list[Markup] = []
    for layer, chosen in enumerate(head_map.retrieval_heads):
        for head in range(heads):
            place = (_LEFT + layer * _CELL, _TOP + head * _CELL)
            shapes += _square(head_map, layer, head, place, chosen, best)
    every = max(1, round(layers / 15))
    bottom = _TOP + heads * _CELL
    for layer in range(0, layers, every):
        place = (_LEFT + (layer + 0.5) * _CELL, bottom + 14)
        shapes.append(text(place, str(layer), "tick middle"))
    for head in range(0, heads, max(1, round(heads / 16))):
        shapes.append(text((_LEFT - 4, _TOP + head * _CELL + 11), str(head), "tick end"))
    shapes.append(text((_LEFT + layers * _CELL / 2, bottom + 29), "layer", "axis middle"))
    shapes.append(
        tag(
            "text",
            "head",
            transform=f"translate(10 {_TOP + heads * _CELL / 2:.0f}) rotate(-90)",
            class_="axis middle",
        )
    )
    width, height = _LEFT + layers * _CELL + 8, bottom + _BOTTOM
    drawing = picture(width, height, _in_words(head_map), shapes, class_="heat")
    # Squares keep a size that a finger can hit: on a phone, the picture scrolls.
    return tag(
        "div", drawing, style=f"min-width:{width * 0.75:.0f}px;max-width:{width * 1.5:.0f}px"
    )


def _square(
    head_map: HeadMap,
    layer: int,
    head: int,
    place: tuple[float, float],
    chosen: tuple[int, ...] | None,
    best: float,
) -> list[Markup]:
    (x, y), side = place, _CELL - 2
    score = _score(head_map, layer, head)
    if chosen is None:
        hint = tag("title", f"layer {layer}, head {head}: has a window of its own, not converted")
        return [tag("rect", hint, x=x + 1, y=y + 1, width=side, height=side, class_="mark as-is")]
    kind = "retrieval head" if head in chosen else "sees its window alone"
    written = "no score known" if score is None else f"score {score:.3f}"
    # Few heads have high scores: the square root spreads the many low ones.
    level = (max(score or 0.0, 0.0) / best) ** 0.5 if best > 0 else 0.0
    square = tag(
        "rect",
        tag("title", f"layer {layer}, head {head}: {written}, {kind}"),
        x=x + 1,
        y=y + 1,
        width=side,
        height=side,
        style=f"--level:{level:.2f}",
        class_="mark head" + (" retrieval" if head in chosen else ""),
    )
    if head not in chosen:
        return [square]
    return [square, tag("circle", cx=x + _CELL / 2, cy=y + _CELL / 2, r=2, class_="dot")]


def _table(head_map: HeadMap) -> Markup:
    rows = []
    for layer, chosen in enumerate(head_map.retrieval_heads):
        cells = []
        for head in range(head_map.num_attention_heads):
            score = _score(head_map, layer, head)
            written = NOTHING if score is None else f"{score:.3f}"
            if chosen is not None and head in chosen:
                cells.append(cell(tag("b", f"● {written}")))
            else:
                cells.append(cell(written if chosen is not None else "as it was"))
        rows.append((f"layer {layer}", *cells))
    header = ("", *(f"head {head}" for head in range(head_map.num_attention_heads)))
    return table("Retrieval scores of all heads; ● and bold: retrieval head", header, rows, "dense")


def _score(head_map: HeadMap, layer: int, head: int) -> float | None:
    scores = head_map.scores[layer] if layer < len(head_map.scores) else None
    return scores[head] if scores else None


def _in_words(head_map: HeadMap) -> str:
    listed = "; ".join(
        f"layer {layer}: {', '.join(map(str, heads))}"
        for layer, heads in enumerate(head_map.retrieval_heads)
        if heads
    )
    return f"Head map by layer and head. Retrieval heads: {listed or 'none'}. Scores: table below."

"""Head map as a picture in the terminal."""

from __future__ import annotations

from rich.text import Text

from rtpurbo.config import HeadMap

SHADES = "·░▒▓█"
RETRIEVAL = "●"
# Dark to bright, of 256 colours: retrieval heads from green to yellow, the others grey.
_RETRIEVAL_COLORS = (28, 34, 40, 118, 226)
_LOCAL_COLORS = (238, 241, 244, 248, 252)


def head_map_picture(head_map: HeadMap) -> Text:
    """Returns a row per layer and a column per query head; brighter is a higher retrieval score.

    Retrieval heads are round and coloured, other heads square and grey.
    """
    picture = Text()
    best = max((max(row) for row in head_map.scores if row), default=0.0)
    for layer, heads in enumerate(head_map.retrieval_heads):
        picture.append(f"layer {layer:>3}  ", "dim")
        if heads is None:
            picture.append("has a window of its own and is not converted\n", "dim italic")
            continue
        scores = head_map.scores[layer] if layer < len(head_map.scores) else None
        for head in range(head_map.num_query_heads(layer)):
            share = score_level(scores[head] if scores else None, best)
            level = min(int(share * len(SHADES)), len(SHADES) - 1)
            if head in heads:
                picture.append(RETRIEVAL, f"bold color({_RETRIEVAL_COLORS[level]})")
            else:
                picture.append(SHADES[level], f"color({_LOCAL_COLORS[level]})")
            picture.append(" ")
        picture.append(f" {len(heads) or ''}\n", "dim")
    picture.append(
        f"{RETRIEVAL} retrieval head ({head_map.num_retrieval_heads} of {head_map.num_heads})   "
        f"{SHADES} other heads, by retrieval score",
        "dim",
    )
    return picture


def score_level(score: float | None, best: float) -> float:
    """Returns the brightness of a retrieval score, from 0 to 1 for the best.

    Few heads have high scores: the square root spreads the many low ones.
    """
    return (max(score or 0.0, 0.0) / best) ** 0.5 if best > 0 else 0.0

"""Draws the pictures of docs/concepts.md, which follow the light or dark setting of the reader's system.

    python docs/tooling/pictures.py

The first three are drawings; the masses in the third go through the library's own rule. The last one
shows the cache of the shipped artifact.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rtpurbo.config import AttentionRule
from rtpurbo.files import write_text_atomically
from rtpurbo.models.artifact import ArtifactConfig
from rtpurbo.ops.eager.selection import smallest_set, target_mass
from rtpurbo.reporting.html.markup import Content, Markup, join, tag

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
ARTIFACT = ROOT / "artifacts" / "smollm2-135m-instruct"

WIDTH = 480  # as wide as a phone can show with text that is still readable
INNER = 450
LEFT = (WIDTH - INNER) / 2

# Okabe and Ito's colours, as in the report.
STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #1b1f24; }
.soft { fill: #57606a; } .bold { font-weight: 600; }
.none { fill: #e3e7ec; } .sink { fill: #b2558c; } .near { fill: #0072b2; } .far { fill: #d55e00; }
.query { fill: #1b1f24; } .line { stroke: #1b1f24; stroke-width: 1.5; fill: none; }
@media (prefers-color-scheme: dark) {
  text { fill: #e8eaed; } .soft { fill: #a5afba; }
  .none { fill: #323941; } .sink { fill: #e29ac4; } .near { fill: #56b4e9; } .far { fill: #ff8a3d; }
  .query { fill: #e8eaed; } .line { stroke: #e8eaed; }
}
"""


def picture(title: str, height: float, *children: Content | Sequence[Content]) -> str:
    """An SVG file of the common width."""
    return tag(
        "svg",
        tag("title", title),
        tag("style", STYLE),
        *children,
        xmlns="http://www.w3.org/2000/svg",
        view_box=f"0 0 {WIDTH} {height:g}",
        role="img",
    )


def label(x: float, y: float, text: str, anchor: str = "start", class_: str = "") -> Markup:
    """A line of text."""
    return tag("text", text, x=x, y=y, text_anchor=anchor, class_=class_ or None)


def box(x: float, y: float, width: float, height: float, class_: str) -> Markup:
    """A filled rectangle."""
    return tag("rect", x=x, y=y, width=width, height=height, rx=min(2, width / 4), class_=class_)


def key(x: float, y: float, *entries: tuple[str, str, float]) -> Markup:
    """Swatches with their meaning; each entry is a class, a text and the room it takes."""
    parts: list[Content] = []
    for class_, text, room in entries:
        parts += [box(x, y - 10, 11, 11, class_), label(x + 16, y, text, class_="soft")]
        x += room
    return join(parts)


TOKENS, SINKS, WINDOW = 30, 2, 7
ESTIMATES = {5: 0.18, 6: 0.25, 11: 1.0, 12: 0.85, 15: 0.12, 19: 0.62, 20: 0.2}


def how_a_query_finds_its_tokens() -> str:
    """One query, its context, and what a local head and a retrieval head read of it."""
    pitch = INNER / TOKENS
    chosen = {place for place, height in ESTIMATES.items() if height > 0.5}

    def x_of(place: float) -> float:
        return LEFT + place * pitch

    def kind(place: int) -> str:
        if place == TOKENS - 1:
            return "query"
        return "sink" if place < SINKS else "near" if place >= TOKENS - WINDOW else "none"

    def strip(y: float, kinds: Sequence[str]) -> Markup:
        return join(box(x_of(n), y, pitch - 2, 16, each) for n, each in enumerate(kinds))

    every = [kind(place) for place in range(TOKENS)]
    found = ["far" if place in chosen else every[place] for place in range(TOKENS)]
    bars = (
        box(x_of(n), 176 - 42 * (h := ESTIMATES.get(n, 0.05)), pitch - 2, 42 * h, "far" if n in chosen else "none")
        for n in range(SINKS, TOKENS - WINDOW)
    )  # fmt: skip
    return picture(
        "Of a long context, a local head reads the first tokens and a recent window; a retrieval head also "
        "reads the far tokens that its index estimates to matter.",
        282,
        label(LEFT, 20, "The context of a query", class_="bold"),
        strip(30, every),
        label(x_of(0), 64, "sinks", class_="soft"),
        label(x_of((SINKS + TOKENS - WINDOW) / 2), 64, "far tokens", "middle", "soft"),
        label(x_of(TOKENS), 64, "window, query", "end", "soft"),
        label(LEFT, 96, "1. The index estimates every far token's attention, from 16", class_="bold"),
        label(LEFT + 17, 113, "dimensions a token instead of all", class_="bold"),
        bars,
        tag("path", d=f"M{x_of(SINKS):g} 176H{x_of(TOKENS - WINDOW):g}", class_="line"),
        label(LEFT, 204, "2. A retrieval head reads those that make up enough of it", class_="bold"),
        strip(212, found),
        label(LEFT, 254, "A local head reads sinks and window alone", class_="bold"),
        strip(262, every),
    )  # fmt: skip


def kinds_of_heads() -> str:
    """Which keys each row of a prompt and an answer reads, in both kinds of heads."""
    rows, prompt, window, sinks = 22, 16, 5, 1
    cell = 9.4
    found = {16: (4, 5), 17: (4, 5, 9), 18: (9,), 19: (4, 12), 20: (12, 13), 21: (4,)}

    def triangle(x: float, retrieves: bool) -> Markup:
        cells = []
        for row in range(rows):
            for column in range(row + 1):
                if column < sinks:
                    class_ = "sink"
                elif row - column < window:
                    class_ = "near"
                elif retrieves and (row < prompt or column in found[row]):
                    class_ = "far"
                else:
                    class_ = "none"
                cells.append(
                    box(x + column * cell, 34 + row * cell, cell - 1.4, cell - 1.4, class_)
                )
        line = 34 + prompt * cell - 0.7
        return join(cells, tag("path", d=f"M{x:g} {line:g}h{rows * cell:g}", class_="line"))

    side = rows * cell
    second = WIDTH - LEFT - side
    bottom = 34 + prompt * cell
    return picture(
        "In a local head every row reads sinks and window. In a retrieval head the rows of the prompt read "
        "everything and the rows of the answer what their index selects.",
        278,
        label(LEFT, 20, "A local head", class_="bold"),
        triangle(LEFT, retrieves=False),
        label(second, 20, "A retrieval head", class_="bold"),
        triangle(second, retrieves=True),
        label(LEFT + side, bottom - 6, "prompt", "end", "soft"),
        label(second + side, bottom - 6, "prompt", "end", "soft"),
        key(LEFT, 266, ("sink", "sinks", 66), ("near", "window", 80)),
        key(LEFT + 146, 266, ("far", "far, read", 88), ("none", "not read", 90)),
    )  # fmt: skip


def dynamic_top_p() -> str:
    """Two queries under the library's own rule: one looks far back, one does not."""
    rule = AttentionRule(top_p=0.9, min_tokens=0)
    queries = {
        "A query that looks something up": (0.3, [0.31, 0.17, 0.1, 0.05, 0.03, 0.02, 0.012, 0.008]),
        "A query that goes on with its sentence": (0.94, [0.02, 0.015, 0.01, 0.008, 0.007]),
    }
    parts: list[Content] = []
    y = 20.0
    for title, (near_mass, far_masses) in queries.items():
        mass = torch.tensor([near_mass, *far_masses])
        near = torch.arange(len(mass)) == 0
        candidates, target = target_mass(rule, mass[None, None, None], near, ~near)
        read = smallest_set(candidates, target)[0, 0, 0].tolist()
        count = sum(read)
        reads = f"it reads {count} far tokens" if count else "near tokens are enough"
        parts += [label(LEFT, y, title, class_="bold")]
        x = LEFT
        for place, share in enumerate(mass.tolist()):
            class_ = "near" if place == 0 else "far" if read[place] else "none"
            parts.append(box(x, y + 12, max(share * INNER - 1.5, 1), 26, class_))
            x += share * INNER
        line = LEFT + rule.top_p * INNER
        parts += [
            tag("path", d=f"M{line:g} {y + 6:g}v38", class_="line"),
            label(line, y + 57, "p = 0.9", "middle", "soft"),
            label(LEFT, y + 57, reads, class_="soft"),
        ]
        y += 92
    return picture(
        "Attention mass of two queries. The one that looks something up reads far tokens until 0.9 of its "
        "mass is covered; the other has that much in its window.",
        y + 16,
        parts,
        key(LEFT, y + 2, ("near", "sinks and window, exact", 190), ("far", "far, read", 92), ("none", "left out", 90)),
    )  # fmt: skip


def what_the_cache_holds() -> str:
    """The cache of the shipped artifact at 8K, a column for every KV head, to scale."""
    config = ArtifactConfig.read(ARTIFACT).config
    head_map, rule = config.head_map, config.attention
    context, top, height = 8192, 46, 150
    ring = rule.num_sink_tokens + rule.sliding_window
    heads = [
        layer_head in head_map.full_key_value_heads(layer)
        for layer, retrieval in enumerate(head_map.retrieval_heads)
        if retrieval is not None
        for layer_head in range(head_map.num_key_value_heads)
    ]
    pitch = INNER / len(heads)
    columns: list[Content] = []
    for number, is_full in enumerate(heads):
        tokens = context if is_full else ring
        tall = height * tokens / context
        x = LEFT + number * pitch
        columns.append(box(x, top, pitch - 1, height - tall, "none") if not is_full else None)
        columns.append(box(x, top + height - tall, pitch - 1, tall, "far" if is_full else "near"))
    full = sum(heads)
    return picture(
        f"Of {len(heads)} KV heads, {full} keep every token of the context, the others the last {ring:,}.",
        256,
        label(LEFT, 18, f"The {len(heads)} KV heads of SmolLM2-135M-Instruct at {context:,} tokens,", class_="bold"),
        label(LEFT, 35, "layer by layer", class_="bold"),
        columns,
        label(LEFT, top + height + 18, "first layer", class_="soft"),
        label(LEFT + INNER, top + height + 18, "last layer", "end", "soft"),
        key(LEFT, 246, ("far", f"{full} kept whole", 128), ("near", f"{ring:,} tokens", 112)),
        key(LEFT + 240, 246, ("none", "never stored", 100)),
    )  # fmt: skip


def main() -> None:
    """Writes every picture."""
    pictures = {
        "query.svg": how_a_query_finds_its_tokens(),
        "heads.svg": kinds_of_heads(),
        "top-p.svg": dynamic_top_p(),
        "cache.svg": what_the_cache_holds(),
    }
    for name, drawn in pictures.items():
        write_text_atomically(IMAGES / name, f"{drawn}\n")


if __name__ == "__main__":
    main()

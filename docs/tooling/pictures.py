"""Draws the pictures of docs/concepts.md, which follow the light or dark setting of the viewer's system.

    python docs/tooling/pictures.py

The first three are drawings; the masses in the third go through the library's own rule. The last one
shows the cache of the shipped artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.patches import Rectangle

from rtpurbo.config import AttentionRule
from rtpurbo.files import write_text_atomically
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.ops.eager.selection import smallest_set, target_mass
from rtpurbo.reporting.palette import PALETTE
from rtpurbo.reporting.svg import figure_style, svg, svg_document

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs" / "images"
ARTIFACT = ROOT / "artifacts" / "smollm2-135m-instruct"

WIDTH = 480  # as wide as a phone can show with text that is still readable
INNER = 450
LEFT = (WIDTH - INNER) / 2

COLORS = {"none": "edge", "sink": "s3", "near": "s0", "far": "s1", "query": "ink"}
"""Palette names of the kinds of tokens."""


class Canvas:
    """A drawing of the common width, with the origin at its upper left corner."""

    def __init__(self, title: str, height: float) -> None:
        self.title, self.height = title, height
        with figure_style() as new_figure:
            self.figure = new_figure(figsize=(WIDTH / 72, height / 72))
            self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")

    def label(self, x: float, y: float, text: str, anchor: str = "left", kind: str = "") -> None:
        """Draws a line of text on a baseline; the kind is `bold`, `soft` or empty."""
        self.axes.text(
            x, y, text, ha=anchor, va="baseline", fontsize=13,
            fontweight="bold" if kind == "bold" else "normal",
            color=PALETTE["soft" if kind == "soft" else "ink"][0],
        )  # fmt: skip

    def box(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """Draws a filled rectangle."""
        color = PALETTE[COLORS[kind]][0]
        self.axes.add_patch(Rectangle((x, y), width, height, facecolor=color, linewidth=0))

    def line(self, x: Sequence[float], y: Sequence[float]) -> None:
        """Draws a thin line."""
        self.axes.plot(x, y, color=PALETTE["ink"][0], linewidth=1.5)

    def key(self, x: float, y: float, *entries: tuple[str, str, float]) -> None:
        """Draws swatches with their meaning; an entry is a kind, a text and its width."""
        for kind, text, room in entries:
            self.box(x, y - 10, 11, 11, kind)
            self.label(x + 16, y, text, kind="soft")
            x += room

    def document(self) -> str:
        """Returns the content of an SVG file."""
        with figure_style():
            return svg_document(svg(self.figure, self.title), self.title)


TOKENS, SINKS, WINDOW = 30, 2, 7
ESTIMATES = {5: 0.18, 6: 0.25, 11: 1.0, 12: 0.85, 15: 0.12, 19: 0.62, 20: 0.2}


def how_a_query_finds_its_tokens() -> str:
    """One query, its context, and the tokens that a local head and a retrieval head read."""
    pitch = INNER / TOKENS
    chosen = {place for place, height in ESTIMATES.items() if height > 0.5}

    def x_of(place: float) -> float:
        return LEFT + place * pitch

    def kind(place: int) -> str:
        if place == TOKENS - 1:
            return "query"
        return "sink" if place < SINKS else "near" if place >= TOKENS - WINDOW else "none"

    every = [kind(place) for place in range(TOKENS)]
    found = ["far" if place in chosen else every[place] for place in range(TOKENS)]
    canvas = Canvas(
        "Of a long context, a local head reads the first tokens and a recent window; a retrieval head also "
        "reads the distant tokens that its index estimates to matter.",
        282,
    )

    def strip(y: float, kinds: Sequence[str]) -> None:
        for place, each in enumerate(kinds):
            canvas.box(x_of(place), y, pitch - 2, 16, each)

    canvas.label(LEFT, 20, "The context of a query", kind="bold")
    strip(30, every)
    canvas.label(x_of(0), 64, "sinks", kind="soft")
    canvas.label(x_of((SINKS + TOKENS - WINDOW) / 2), 64, "distant tokens", "center", "soft")
    canvas.label(x_of(TOKENS), 64, "window, query", "right", "soft")
    canvas.label(LEFT, 96, "1. The index estimates distant tokens' attention from a", kind="bold")
    canvas.label(LEFT + 17, 113, "few dimensions per token", kind="bold")
    for place in range(SINKS, TOKENS - WINDOW):
        tall = 42 * ESTIMATES.get(place, 0.05)
        canvas.box(x_of(place), 176 - tall, pitch - 2, tall, "far" if place in chosen else "none")
    canvas.line((x_of(SINKS), x_of(TOKENS - WINDOW)), (176, 176))
    canvas.label(
        LEFT, 204, "2. A retrieval head reads those that make up enough of it", kind="bold"
    )
    strip(212, found)
    canvas.label(LEFT, 254, "A local head reads only sinks and window", kind="bold")
    strip(262, every)
    return canvas.document()


def kinds_of_heads() -> str:
    """Keys that each query of a prompt and an answer reads, in both kinds of heads."""
    queries, prompt, window, sinks = 22, 16, 5, 1
    cell = 9.4
    found = {16: (4, 5), 17: (4, 5, 9), 18: (9,), 19: (4, 12), 20: (12, 13), 21: (4,)}
    side = queries * cell
    second = WIDTH - LEFT - side
    bottom = 34 + prompt * cell
    canvas = Canvas(
        "In a local head every query reads sinks and window. In a retrieval head the queries of the prompt "
        "read everything and the queries of the answer the tokens that their index selects.",
        278,
    )

    def triangle(x: float, retrieves: bool) -> None:
        for query in range(queries):
            for key in range(query + 1):
                if key < sinks:
                    kind = "sink"
                elif query - key < window:
                    kind = "near"
                elif retrieves and (query < prompt or key in found[query]):
                    kind = "far"
                else:
                    kind = "none"
                canvas.box(x + key * cell, 34 + query * cell, cell - 1.4, cell - 1.4, kind)
        canvas.line((x, x + side), (bottom - 0.7, bottom - 0.7))

    canvas.label(LEFT, 20, "A local head", kind="bold")
    triangle(LEFT, retrieves=False)
    canvas.label(second, 20, "A retrieval head", kind="bold")
    triangle(second, retrieves=True)
    canvas.label(LEFT + side, bottom - 6, "prompt", "right", "soft")
    canvas.label(second + side, bottom - 6, "prompt", "right", "soft")
    canvas.key(LEFT, 266, ("sink", "sinks", 66), ("near", "window", 80))
    canvas.key(LEFT + 146, 266, ("far", "distant, read", 108), ("none", "not read", 90))
    return canvas.document()


def dynamic_top_p() -> str:
    """Two queries under the library's own rule: one looks far back, one does not."""
    rule = AttentionRule(top_p=0.9, min_tokens=0)
    queries = {
        "A query that looks something up": (0.3, [0.31, 0.17, 0.1, 0.05, 0.03, 0.02, 0.012, 0.008]),
        "A query that continues its sentence": (0.94, [0.02, 0.015, 0.01, 0.008, 0.007]),
    }
    canvas = Canvas(
        "Attention mass of two queries. The one that looks something up reads distant tokens until 0.9 of its "
        "mass is covered; the other has that much in its window.",
        220,
    )
    y = 20.0
    for title, (near_mass, far_masses) in queries.items():
        mass = torch.tensor([near_mass, *far_masses])
        near = torch.arange(len(mass)) == 0
        candidates, target = target_mass(rule, mass[None, None, None], near, ~near)
        read = smallest_set(candidates, target)[0, 0, 0].tolist()
        count = sum(read)
        reads = f"reads {count} distant tokens" if count else "sinks and window are enough"
        canvas.label(LEFT, y, title, kind="bold")
        x = LEFT
        for place, share in enumerate(mass.tolist()):
            kind = "near" if place == 0 else "far" if read[place] else "none"
            canvas.box(x, y + 12, max(share * INNER - 1.5, 1), 26, kind)
            x += share * INNER
        line = LEFT + rule.top_p * INNER
        canvas.line((line, line), (y + 6, y + 44))
        canvas.label(line, y + 57, "p = 0.9", "center", "soft")
        canvas.label(LEFT, y + 57, reads, kind="soft")
        y += 92
    canvas.key(
        LEFT, y + 2,
        ("near", "sinks and window, exact", 190), ("far", "distant, read", 110), ("none", "not read", 90),
    )  # fmt: skip
    return canvas.document()


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
        for layer_head in range(head_map.num_kv_heads(layer))
    ]
    pitch = INNER / len(heads)
    full = sum(heads)
    canvas = Canvas(
        f"Of {len(heads)} KV heads, {full} keep every token of the context, the others the last {ring:,}.",
        256,
    )
    for number, is_full in enumerate(heads):
        tall = height * (context if is_full else ring) / context
        x = LEFT + number * pitch
        if not is_full:
            canvas.box(x, top, pitch - 1, height - tall, "none")
        canvas.box(x, top + height - tall, pitch - 1, tall, "far" if is_full else "near")
    title = f"The {len(heads)} KV heads of SmolLM2-135M-Instruct at {context:,} tokens,"
    canvas.label(LEFT, 18, title, kind="bold")
    canvas.label(LEFT, 35, "layer by layer", kind="bold")
    canvas.label(LEFT, top + height + 18, "first layer", kind="soft")
    canvas.label(LEFT + INNER, top + height + 18, "last layer", "right", "soft")
    canvas.key(LEFT, 246, ("far", f"{full} full", 128), ("near", f"{ring:,} tokens", 112))
    canvas.key(LEFT + 240, 246, ("none", "never stored", 100))
    return canvas.document()


def main() -> None:
    """Writes every picture."""
    pictures: dict[str, Callable[[], str]] = {
        "query.svg": how_a_query_finds_its_tokens,
        "heads.svg": kinds_of_heads,
        "top-p.svg": dynamic_top_p,
        "cache.svg": what_the_cache_holds,
    }
    for name, draw in pictures.items():
        write_text_atomically(IMAGES / name, f"{draw()}\n")


if __name__ == "__main__":
    main()

"""Contents of an artifact, shown without loading its model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, JustifyMethod, RenderableType
from rich.markup import escape
from rich.rule import Rule
from rich.table import Column, Table

from rtpurbo.formats import short_bytes, short_length
from rtpurbo.models.artifact_config import LOG_FILE, ArtifactConfig
from rtpurbo.reporting.cache_sizes import cache_sizes, read_cache_shape, stored_tokens
from rtpurbo.reporting.headmap import head_map_picture
from rtpurbo.reporting.model_card import artifact_facts
from rtpurbo.training.curves import training_curves
from rtpurbo.training.log import TrainingLog
from rtpurbo.visible import visible

CACHE_LENGTHS = (8192, 32768, 131072)
"""Context lengths whose cache sizes are shown."""


def inspect_artifact(folder: Path) -> Group:
    """Returns facts, head map, cache sizes, training curves and files, for a rich console.

    Raises:
        RTPurboError: `folder` holds no artifact, or a broken one.
    """
    artifact = ArtifactConfig.read(folder)
    curves = training_curves(TrainingLog(folder / LOG_FILE).entries())
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = [(str(path.relative_to(folder)), short_bytes(path.stat().st_size)) for path in files]
    parts: list[RenderableType] = [
        Rule("artifact", align="left"),
        _grid(artifact_facts(artifact)),
        Rule("retrieval heads", align="left"),
        head_map_picture(artifact.config.head_map),
    ]
    parts += [Rule("KV cache of one sequence", align="left"), _cache_table(folder, artifact)]
    if curves.row_count:
        parts += [Rule("training", align="left"), curves]
    parts += [Rule("files", align="left"), _grid(sizes)]
    return Group(*parts)


def _cache_table(folder: Path, artifact: ArtifactConfig) -> Table:
    """Cache sizes by context length; relative ones where the base model's sizes are not known."""
    shape = read_cache_shape(folder)
    rows = [("context", *map(short_length, CACHE_LENGTHS))]
    if shape is None:
        name = "relative to dense, without index keys"
        sizes = [stored_tokens(artifact.config, length) for length in CACHE_LENGTHS]
    else:
        name = "ratio"
        sizes = [cache_sizes(artifact.config, shape, length) for length in CACHE_LENGTHS]
        rows += [
            (f"sparse, {shape.dtype}", *(short_bytes(sparse) for sparse, _ in sizes)),
            (f"dense, {shape.dtype}", *(short_bytes(dense) for _, dense in sizes)),
        ]
    return _grid([*rows, (name, *(f"{sparse / dense:.2f}x" for sparse, dense in sizes))], "right")


def _grid(rows: Sequence[tuple[str, ...]], justify: JustifyMethod = "left") -> Table:
    """Rows with their names in the first column."""
    others = [Column(justify=justify) for _ in rows[0][1:]]
    table = Table.grid(Column(style="dim"), *others, padding=(0, 2))
    for row in rows:
        # Names in an artifact are untrusted, and no markup.
        table.add_row(*(escape(visible(text)) for text in row))
    return table

"""All there is to see of an artifact without loading its model."""

from __future__ import annotations

from pathlib import Path

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.rule import Rule
from rich.table import Table

from rtpurbo.formats import short_bytes
from rtpurbo.models.artifact import LOG_FILE, ArtifactConfig
from rtpurbo.reporting.curves import training_curves
from rtpurbo.reporting.facts import artifact_facts
from rtpurbo.reporting.headmap import head_map_picture
from rtpurbo.training.log import TrainingLog
from rtpurbo.visible import visible


def inspect_artifact(folder: Path) -> Group:
    """Facts, head map, training curves and sizes of files, for a rich console.

    Raises:
        RTPurboError: `folder` holds no artifact, or a broken one.
    """
    artifact = ArtifactConfig.read(folder)
    curves = training_curves(TrainingLog(folder / LOG_FILE).entries())
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = [(str(path.relative_to(folder)), short_bytes(path.stat().st_size)) for path in files]
    parts: list[RenderableType] = [
        Rule("artifact", align="left"),
        _two_columns(artifact_facts(artifact)),
        Rule("retrieval heads", align="left"),
        head_map_picture(artifact.config.head_map),
    ]
    if curves.row_count:
        parts += [Rule("training", align="left"), curves]
    parts += [Rule("files", align="left"), _two_columns(sizes)]
    return Group(*parts)


def _two_columns(rows: list[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    for row in rows:
        # Names in an artifact are somebody else's, and no markup.
        table.add_row(*(escape(visible(text)) for text in row))
    return table

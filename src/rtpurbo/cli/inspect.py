"""`rtpurbo inspect`."""

from __future__ import annotations

from rtpurbo.cli import options


def inspect(artifact: options.Artifact) -> None:
    """Show settings, retrieval heads, cache sizes, training and files of an artifact."""
    from rich.console import Console

    from rtpurbo.models.artifact_config import find_artifact
    from rtpurbo.reporting.inspection import inspect_artifact

    Console().print(inspect_artifact(find_artifact(artifact)))

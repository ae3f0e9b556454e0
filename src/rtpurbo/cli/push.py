"""`rtpurbo push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    artifact: Annotated[Path, typer.Argument(help="Folder that `rtpurbo convert` wrote.")],
    name: Annotated[str, typer.Argument(help="Repository on the Hugging Face Hub: you/model.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
) -> None:
    """Upload an artifact to the Hugging Face Hub; others then load it by its name.

    Log in first, with `hf auth login`.
    """
    from rtpurbo.publishing import push_artifact

    typer.echo(push_artifact(artifact, name, private=private))

"""`rtpurbo calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rtpurbo.cli import options


def calibrate(
    context: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write.")],
    model: options.Model = None,
    effort: options.Effort = "auto",
    max_length: options.MaxLength = None,
    data: options.Data = None,
    ratio: options.Ratio = None,
    threshold: options.Threshold = None,
    count: options.Count = None,
    others: options.Set = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    force: options.Force = False,
) -> None:
    """Step 1: find the heads that retrieve, and show them.

    Sentences stand twice in long prose; heads that look back from the second to the first retrieve.
    The head map is written for `rtpurbo train-indexer`.
    """
    from rich.console import Console

    from rtpurbo import conversion
    from rtpurbo.cli.progress import ProgressBars
    from rtpurbo.job_options import settings_options
    from rtpurbo.reporting.headmap import head_map_picture

    with ProgressBars() as progress:
        given = settings_options(options.job_options(context))
        head_map = conversion.calibrate(model, output, force=force, progress=progress, **given)
    Console().print(head_map_picture(head_map))
    typer.echo(f"Written to {output}.")

"""`rtpurbo train-indexer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rtpurbo.cli import options


def train_indexer(
    context: typer.Context,
    head_map: Annotated[Path, typer.Option(help="File that `rtpurbo calibrate` wrote.")],
    output_dir: options.OutputFolder,
    model: options.Model = None,
    effort: options.Effort = "auto",
    max_length: options.MaxLength = None,
    data: options.Data = None,
    window: options.Window = None,
    top_p: options.TopP = None,
    reading: options.ReadingOption = None,
    index_space: options.IndexSpaceOption = None,
    index_dim: options.IndexDim = None,
    stage1_steps: options.Stage1Steps = None,
    stream: options.Stream = None,
    parallel: options.Parallel = "data",
    report_to: options.ReportTo = None,
    others: options.Set = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    resume: options.Resume = False,
    force: options.Force = False,
) -> None:
    """Step 2: train the token indexers, which tell retrieval heads where to look.

    The model's own weights stay as they are. The result is an artifact that works already;
    `rtpurbo distill` makes it better.
    """
    from rtpurbo import conversion
    from rtpurbo.cli.progress import ProgressBars, say
    from rtpurbo.interruption import stopping_cleanly

    with stopping_cleanly(), ProgressBars() as progress:
        folder = conversion.train_indexer(
            model, head_map, output_dir, **options.job_options(context, progress)
        )
    say(f"Written to {folder}.")

"""`rtpurbo calibrate`, `train-indexer` and `distill`: the steps of a conversion."""

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
    """Step 1: find the retrieval heads and show them.

    The head map is written for `rtpurbo train-indexer`.
    """
    given = options.job_options(context)

    from rich.console import Console

    from rtpurbo import conversion
    from rtpurbo.cli.progress import ProgressBars
    from rtpurbo.conversion.options import settings_options
    from rtpurbo.reporting.headmap import head_map_picture

    with ProgressBars() as progress:
        head_map = conversion.calibrate(
            model, output, force=force, progress=progress, **settings_options(given)
        )
    Console().print(head_map_picture(head_map))
    typer.echo(f"Written to {output}.")


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
    """Step 2: train the token indexers, which select the tokens that retrieval heads read.

    The model's weights do not change. The result is a complete artifact; `rtpurbo distill` adds stage 2.
    """
    given = options.job_options(context)

    from rtpurbo import conversion
    from rtpurbo.cli.progress import ProgressBars, say
    from rtpurbo.interruption import stopping_cleanly

    with stopping_cleanly(), ProgressBars() as progress:
        given["progress"] = progress
        folder = conversion.train_indexer(model, head_map, output_dir, **given)
    say(f"Written to {folder}.")


def distill(
    context: typer.Context,
    artifact: options.Artifact,
    output_dir: options.OutputFolder,
    effort: options.Effort = "auto",
    max_length: options.MaxLength = None,
    data: options.Data = None,
    stage2_steps: options.Stage2Steps = None,
    lora_rank: options.LoraRank = None,
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
    """Step 3: distil the dense model into the sparse one.

    Reads an artifact of `rtpurbo train-indexer` and writes another one with trained weights.
    """
    given = options.job_options(context)

    from rtpurbo import conversion
    from rtpurbo.cli.progress import ProgressBars, say
    from rtpurbo.interruption import stopping_cleanly

    with stopping_cleanly(), ProgressBars() as progress:
        given["progress"] = progress
        folder = conversion.distill(artifact, output_dir, **given)
    say(f"Written to {folder}.")

"""`rtpurbo distill`."""

from __future__ import annotations

import typer

from rtpurbo.cli import options


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
    """Step 3: teach the sparse model to answer as the dense one does.

    Takes an artifact that `rtpurbo train-indexer` wrote and writes another, with adapted weights.
    """
    from rtpurbo import conversion
    from rtpurbo.cli.progress import ProgressBars, say
    from rtpurbo.interruption import stopping_cleanly

    with stopping_cleanly(), ProgressBars() as progress:
        folder = conversion.distill(artifact, output_dir, **options.job_options(context, progress))
    say(f"Written to {folder}.")

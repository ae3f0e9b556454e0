"""`rtpurbo convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rtpurbo.cli import options
from rtpurbo.errors import RTPurboError


def convert(
    context: typer.Context,
    model: options.Model = None,
    output_dir: Annotated[
        Path | None,
        options.optional(
            "--output-dir",
            "-o",
            help="Output folder, written whole or not at all. Required without --dry-run.",
        ),
    ] = None,
    effort: options.Effort = "auto",
    max_length: options.MaxLength = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the plan and stop; reads the model's configuration, but no weights.",
        ),
    ] = False,
    data: options.Data = None,
    ratio: options.Ratio = None,
    threshold: options.Threshold = None,
    count: options.Count = None,
    window: options.Window = None,
    top_p: options.TopP = None,
    reading: options.ReadingOption = None,
    index_space: options.IndexSpaceOption = None,
    index_dim: options.IndexDim = None,
    stage1_steps: options.Stage1Steps = None,
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
    preset: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Convert a dense model: find its retrieval heads, train their indexers, optionally distil.

    The result is a small folder, an *artifact*, with which the dense model is loaded as a sparse one.
    Default settings depend on the model's context; the plan is printed first.

    `rtpurbo convert HuggingFaceTB/SmolLM2-135M-Instruct -o smollm2-sparse`
    """
    if preset is not None:
        raise RTPurboError(
            "--preset was replaced by --effort: choose quick, standard, thorough or auto."
        )
    if output_dir is None and not dry_run:
        raise RTPurboError("no output folder was given: name one with --output-dir.")
    given = options.job_options(context)

    from rtpurbo import conversion
    from rtpurbo.cli.progress import ProgressBars, say
    from rtpurbo.conversion.options import settings_options
    from rtpurbo.interruption import stopping_cleanly

    if output_dir is None or dry_run:
        say(str(conversion.plan_conversion(model, **settings_options(given))))
        return
    with stopping_cleanly(), ProgressBars() as progress:
        given["progress"] = progress
        folder = conversion.convert(model, output_dir, on_plan=lambda plan: say(str(plan)), **given)
    say(f"Written to {folder}. Try: rtpurbo generate {folder} 'Once upon a time'")

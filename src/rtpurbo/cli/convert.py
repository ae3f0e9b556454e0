"""`rtpurbo convert`."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from rtpurbo.cli import options


def convert(
    output_dir: options.OutputFolder,
    model: options.Model = None,
    preset: Annotated[
        Literal["auto", "quick", "standard"],
        typer.Option(
            help="Settings to start from: quick suits two CPU cores and minutes, standard a GPU; "
            "auto takes what suits the device."
        ),
    ] = "auto",
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
) -> None:
    """Make a model sparse: find the heads that retrieve, train their indexers, adapt the rest.

    The result is a small folder, an *artifact*, that turns the dense model into its sparse version
    wherever both are. Options that are left out take the preset's values.

    `rtpurbo convert HuggingFaceTB/SmolLM2-135M-Instruct -o smollm2-sparse`
    """
    from rtpurbo import conversion
    from rtpurbo.cli.progress import ProgressBars, say

    with ProgressBars() as progress:
        folder = conversion.convert(
            model,
            output_dir,
            preset=preset,
            changes=options.changed_settings(
                others,
                ratio=ratio,
                threshold=threshold,
                count=count,
                window=window,
                top_p=top_p,
                reading=reading,
                index_space=index_space,
                index_dim=index_dim,
                stage1_steps=stage1_steps,
                stage2_steps=stage2_steps,
                lora_rank=lora_rank,
                stream=stream,
                seed=seed,
            ),
            data=data or None,
            device=device,
            dtype=dtype,
            resume=resume,
            force=force,
            progress=progress,
            parallel=parallel,
            report_to=report_to or (),
        )
    say(f"Written to {folder}. Try: rtpurbo generate {folder} 'Once upon a time'")

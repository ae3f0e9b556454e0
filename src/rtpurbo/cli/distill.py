"""`rtpurbo distill`."""

from __future__ import annotations

from rtpurbo.cli import options


def distill(
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
        folder = conversion.distill(
            artifact,
            output_dir,
            changes=options.changed_settings(
                others,
                stage2_steps=stage2_steps,
                lora_rank=lora_rank,
                stream=stream,
                seed=seed,
            ),
            effort=effort,
            max_length=max_length,
            data=data or None,
            device=device,
            dtype=dtype,
            resume=resume,
            force=force,
            progress=progress,
            parallel=parallel,
            report_to=report_to or (),
        )
    say(f"Written to {folder}.")

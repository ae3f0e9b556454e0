"""`rtpurbo distill`."""

from __future__ import annotations

import typer

from rtpurbo.cli import options


def distill(
    artifact: options.Artifact,
    output_dir: options.OutputFolder,
    data: options.Data = None,
    stage2_steps: options.Stage2Steps = None,
    lora_rank: options.LoraRank = None,
    others: options.Set = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    resume: options.Resume = False,
    force: options.Force = False,
) -> None:
    """Step 3: teach the sparse model to answer as the dense one does.

    Takes an artifact that `rtpurbo train-indexer` wrote and writes another, with adapted weights.
    """
    from rtpurbo import conversion
    from rtpurbo.cli.progress import ProgressBars

    with ProgressBars() as progress:
        folder = conversion.distill_artifact(
            artifact,
            output_dir,
            changes=options.changed_settings(
                others, stage2_steps=stage2_steps, lora_rank=lora_rank, seed=seed
            ),
            data=data or None,
            device=device,
            resume=resume,
            force=force,
            progress=progress,
        )
    typer.echo(f"Written to {folder}.")

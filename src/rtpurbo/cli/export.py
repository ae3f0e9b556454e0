"""`rtpurbo export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rtpurbo.cli import options
from rtpurbo.serving.rtp_llm import SEQUENCE_THRESHOLD


def export(
    artifact: options.Artifact,
    folder: Annotated[Path, typer.Argument(help="Output folder, written whole or not at all.")],
    target: Annotated[
        Literal["vllm", "rtp-llm", "transformers"],
        typer.Option("--to", help="Format of the export."),
    ],
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Type of the weights; auto keeps the base model's."),
    ] = "auto",
    head_map_only: Annotated[
        bool,
        typer.Option(
            "--head-map-only",
            help="For rtp-llm: write headwise_config.json alone, to be merged into the "
            "config.json of a model that you have.",
        ),
    ] = False,
    sequence_threshold: Annotated[
        int, typer.Option(min=0, help="For rtp-llm: shorter prompts are processed dense.")
    ] = SEQUENCE_THRESHOLD,
    base_model: options.BaseModel = None,
    force: options.Force = False,
) -> None:
    """Write a standalone folder for vLLM, RTP-LLM or transformers, with all weights merged.

    `rtpurbo export smollm2-sparse smollm2-vllm --to vllm`

    vllm: for the plugin that comes with rtpurbo; `rtpurbo serve` starts a server from it.

    rtp-llm: RTP-LLM reads prompts head by head, and decodes dense; it has no token indexer.

    transformers: an artifact that `rtpurbo.load` reads without the base model.
    """
    import torch

    from rtpurbo.serving.export import export

    written = export(
        artifact,
        folder,
        target,
        dtype=None if dtype == "auto" else getattr(torch, dtype),
        base_model=base_model,
        head_map_only=head_map_only,
        sequence_threshold=sequence_threshold,
        force=force,
    )
    typer.echo(f"Written to {written}.")

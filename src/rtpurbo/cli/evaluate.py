"""`rtpurbo eval`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from rtpurbo.cli import options


def evaluate(
    artifact: options.Artifact,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="needle (questions about numbers hidden in prose), perplexity, or one task of "
            "them: needle:single, needle:multikey, needle:multivalue. With lengths of its own: "
            "perplexity@2048,8192. Repeat it for several.",
            show_default="needle, perplexity",
        ),
    ] = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            min=2,
            help="Tokens of a test, within the model's context. Repeat it for several.",
            show_default="2048, 4096",
        ),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions or windows of each test.")] = 10,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            help="What to compare: full (the dense model), rtpurbo, rtpurbo-sparse-prefill (sparse "
            "in the prompt too), rtpurbo-before-stage2, and the controls local-only and "
            "random-heads. Repeat it for several.",
            show_default="full, rtpurbo",
        ),
    ] = None,
    data: options.Data = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option(help="Type of the weights; auto is float32 on a CPU, bfloat16 on a GPU."),
    ] = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="JSON file for the results.", show_default=False),
    ] = None,
    write_card: Annotated[
        bool,
        typer.Option("--write-card", help="Put the results into the artifact's README.md."),
    ] = False,
    base_model: options.BaseModel = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
) -> None:
    """Measure what a sparse model keeps of the dense one, what it reads and what its cache weighs.

    Every policy gets the same tests, from the part of the text that conversion does not train on.

    `rtpurbo eval smollm2-sparse --suite needle --length 4096 --samples 20`
    """
    import torch
    from rich.console import Console

    from rtpurbo.cli.progress import ProgressBars
    from rtpurbo.devices import device_name, resolve_device
    from rtpurbo.evaluation import run
    from rtpurbo.evaluation.records import write_results
    from rtpurbo.models.artifact import find_artifact
    from rtpurbo.reporting.card import rewrite_card
    from rtpurbo.reporting.tables import results_table

    place = resolve_device(device)
    with ProgressBars() as progress:
        records = run.evaluate(
            artifact,
            suites=suite or tuple(run.SUITES),
            lengths=length or run.DEFAULT_LENGTHS,
            samples=samples,
            policies=policy or run.DEFAULT_POLICIES,
            data=data or None,
            base_model=base_model,
            seed=seed,
            device=place,
            dtype=None if dtype == "auto" else getattr(torch, dtype),
            progress=progress,
        )
    Console().print(results_table(records))
    if output is not None:
        command = shlex.join(["rtpurbo", *sys.argv[1:]])
        write_results(output, artifact, device_name(place), command, records)
        typer.echo(f"Written to {output}.")
    if write_card:
        rewrite_card(find_artifact(artifact), records)

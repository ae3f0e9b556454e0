"""`rtpurbo bench prefill | decode | model | training | serve`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rtpurbo.cli import bench_serve, options
from rtpurbo.cli.bench_options import (
    EARLIER,
    Batch,
    Density,
    Device,
    Dtype,
    Earlier,
    Geometry,
    HeadDim,
    Heads,
    Implementation,
    KeyValueHeads,
    Layers,
    Length,
    Memory,
    Output,
    Plot,
    Repeats,
    RetrievalHeads,
    RetrievalWindow,
    RowStride,
    TimeLimit,
    Window,
    Windows,
    check_model_options,
)
from rtpurbo.errors import RTPurboError

if TYPE_CHECKING:
    from rtpurbo.benchmarks.session import Session
    from rtpurbo.speed_records import SpeedResults

LENGTHS = [8192, 32768, 131072]
TRAINING_LENGTHS = {"stage1": [49152, 131072], "stage2": [32768]}
PREFILL_DENSITY, DECODE_DENSITY = 0.1, 0.03
WINDOW, RETRIEVAL_WINDOW = 8192, 512

app = typer.Typer(
    no_args_is_help=True,
    help="Measure speed and memory against dense kernels, on an NVIDIA GPU.",
)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    bench_serve.serve
)


@app.command()
def prefill(
    context: typer.Context,
    length: Length = None,
    density: Density = None,
    window: Windows = None,
    retrieval_window: RetrievalWindow = None,
    row_stride: RowStride = None,
    heads: Heads = 32,
    kv_heads: KeyValueHeads = 4,
    head_dim: HeadDim = 128,
    retrieval_heads: RetrievalHeads = 5,
    profile: Annotated[
        str | None,
        options.optional(
            metavar="ARTIFACT",
            help="Use states of a long document instead of random ones: those of the layer with most "
            "retrieval heads of this sparse model, at the density that its index selects.",
        ),
    ] = None,
    base_model: options.BaseModel = None,
    data: options.Data = None,
    dtype: Dtype = "bfloat16",
    implementation: Implementation = None,
    repeats: Repeats = 20,
    time_limit: TimeLimit = 60.0,
    output: Output = None,
    plot: Plot = None,
    earlier: Earlier = EARLIER,
    device: Device = "cuda",
) -> None:
    """Measure prefill attention of one layer.

    `rtpurbo bench prefill --length 131072 --density 0.1 --density 0.2 -o prefill.json`
    """
    from rtpurbo.benchmarks.layer import LayerShape
    from rtpurbo.benchmarks.prefill import IMPLEMENTATIONS, bench_prefill
    from rtpurbo.benchmarks.profile import bench_profile

    shape = LayerShape.spread(heads, kv_heads, head_dim, retrieval_heads)
    near = retrieval_window or RETRIEVAL_WINDOW
    rules = [_rule(size, near, row_stride) for size in window or [WINDOW]]
    densities = _densities(density, PREFILL_DENSITY)
    lengths = length or LENGTHS
    with _measuring(context, IMPLEMENTATIONS) as session:
        if profile is None:
            bench_prefill(session, shape, rules, lengths, densities, _dtype(dtype))
        else:
            bench_profile(
                session, profile, rules[0], lengths, _dtype(dtype), data or None, base_model
            )


@app.command()
def decode(
    context: typer.Context,
    length: Length = None,
    density: Density = None,
    window: Windows = None,
    retrieval_window: RetrievalWindow = None,
    heads: Heads = 32,
    kv_heads: KeyValueHeads = 4,
    head_dim: HeadDim = 128,
    retrieval_heads: RetrievalHeads = 5,
    batch: Batch = None,
    dtype: Dtype = "bfloat16",
    implementation: Implementation = None,
    repeats: Repeats = 20,
    time_limit: TimeLimit = 60.0,
    output: Output = None,
    plot: Plot = None,
    earlier: Earlier = EARLIER,
    device: Device = "cuda",
) -> None:
    """Measure decode attention of one layer, in a CUDA graph.

    `rtpurbo bench decode --length 131072 --batch 1 --batch 8 -o decode.json`
    """
    from rtpurbo.benchmarks.decode import IMPLEMENTATIONS, bench_decode
    from rtpurbo.benchmarks.layer import LayerShape

    shape = LayerShape.spread(heads, kv_heads, head_dim, retrieval_heads)
    rules = [_rule(size, retrieval_window) for size in window or [WINDOW]]
    densities = _densities(density, DECODE_DENSITY)
    lengths, batches = length or LENGTHS, batch or [1]
    with _measuring(context, IMPLEMENTATIONS) as session:
        bench_decode(session, shape, rules, lengths, densities, batches, _dtype(dtype))


@app.command()
def model(
    context: typer.Context,
    geometry: Geometry = "qwen3-8b",
    artifact: Annotated[
        str | None,
        options.optional(
            "--artifact",
            metavar="ARTIFACT",
            help="Instead of a geometry, the model of this artifact with its own weights, rule and head "
            "map, reading held-out text.",
        ),
    ] = None,
    base_model: options.BaseModel = None,
    data: options.Data = None,
    phase: Annotated[
        Literal["both", "decode", "prefill"], typer.Option(help="What to measure.")
    ] = "both",
    layers: Layers = None,
    length: Length = None,
    prefill_density: Annotated[
        float, typer.Option(help="Share of the key blocks read in prefill.")
    ] = PREFILL_DENSITY,
    decode_density: Annotated[
        float, typer.Option(help="Share of the keys selected in decode steps.")
    ] = DECODE_DENSITY,
    window: Window = WINDOW,
    retrieval_window: RetrievalWindow = None,
    row_stride: RowStride = None,
    batch: Batch = None,
    memory: Memory = None,
    dtype: Dtype = "bfloat16",
    implementation: Implementation = None,
    repeats: Repeats = 20,
    time_limit: TimeLimit = 60.0,
    output: Output = None,
    plot: Plot = None,
    earlier: Earlier = EARLIER,
    device: Device = "cuda",
) -> None:
    """Measure a whole model, dense and sparse: random weights with 15 % retrieval heads, or an artifact.

    `rtpurbo bench model --geometry qwen3-8b --phase decode --length 131072 -o model.json`

    `rtpurbo bench model --artifact qwen3-8b-sparse --data books.jsonl.gz --length 32768 --batch 16`
    """
    from rtpurbo.benchmarks.artifact_model import bench_artifact
    from rtpurbo.benchmarks.model import bench_model
    from rtpurbo.benchmarks.model_case import IMPLEMENTATIONS

    check_model_options(context)
    phases = [chosen for chosen in ("decode", "prefill") if phase in ("both", chosen)]
    batches = batch or [1]
    if artifact is not None:
        with _measuring(context, IMPLEMENTATIONS) as session:
            bench_artifact(
                session, artifact, phases, length, batches, _dtype(dtype), data, base_model, memory
            )
        return
    densities = {"model-prefill": prefill_density, "model-decode": decode_density}
    for value in densities.values():
        _densities([value], value)
    rules = {}
    for chosen in phases:
        # A smaller window for retrieval heads is profitable where one block list serves a whole query block.
        near = retrieval_window or (RETRIEVAL_WINDOW if chosen == "prefill" else None)
        rules[f"model-{chosen}"] = _rule(window, near, row_stride)
    with _measuring(context, IMPLEMENTATIONS) as session:
        bench_model(
            session, geometry, rules, length or LENGTHS, densities, batches, _dtype(dtype), layers,
            memory,
        )  # fmt: skip


@app.command()
def training(
    context: typer.Context,
    geometry: Geometry = "qwen3-8b",
    phase: Annotated[Literal["stage1", "stage2"], typer.Option(help="What to measure.")] = "stage1",
    layers: Layers = None,
    length: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Tokens per step. Repeat it for several.",
            show_default="49152, 131072 in stage 1, 32768 in stage 2",
        ),
    ] = None,
    documents: Annotated[
        int,
        typer.Option(
            min=1, help="Documents of equal length that are packed into a step of stage 1."
        ),
    ] = 1,
    window: Window = WINDOW,
    dtype: Dtype = "bfloat16",
    implementation: Implementation = None,
    repeats: Repeats = 5,
    time_limit: TimeLimit = 60.0,
    output: Output = None,
    earlier: Earlier = EARLIER,
    device: Device = "cuda",
) -> None:
    """Measure a training step: stage 1 with 15 % retrieval heads on all queries, or stage 2 of a LoRA.

    `rtpurbo bench training --geometry qwen3-8b --length 49152 --length 131072 -o training.json`
    """
    from rtpurbo.benchmarks.stage1 import bench_stage1
    from rtpurbo.benchmarks.stage2 import bench_stage2
    from rtpurbo.benchmarks.training import IMPLEMENTATIONS

    if phase == "stage2" and documents > 1:
        raise RTPurboError(
            "--documents is for stage 1 only: stage 2 does not pack documents; leave it out."
        )
    rule, lengths = _rule(window, None), length or TRAINING_LENGTHS[phase]
    with _measuring(context, IMPLEMENTATIONS) as session:
        if phase == "stage1":
            bench_stage1(session, geometry, rule, lengths, documents, _dtype(dtype), layers)
        else:
            bench_stage2(session, geometry, rule, lengths, _dtype(dtype), layers)


@app.command()
def show(
    results: Annotated[
        list[Path], typer.Argument(help="JSON files of earlier benchmarks.", show_default=False)
    ],
    window: Annotated[
        int | None, options.optional(min=1, help="Only sparse results with this window.")
    ] = None,
    batch: Annotated[int | None, options.optional(min=1, help="Only this batch size.")] = None,
    implementation: Implementation = None,
    markdown: Annotated[bool, typer.Option(help="Print tables in Markdown.")] = False,
    plot: Plot = None,
) -> None:
    """Show results of earlier benchmarks, of several files together.

    `rtpurbo bench show prefill.json decode.json --plot speed.png`
    """
    from rtpurbo.reporting.figures import check_matplotlib
    from rtpurbo.reporting.speed import is_dense, save_plot, speed_markdown
    from rtpurbo.speed_records import SpeedResults, read_speed

    if plot is not None:
        check_matplotlib("--plot")
    records = [
        record
        for path in results
        for record in read_speed(path).records
        if (window is None or is_dense(record) or record.sliding_window == window)
        and (batch is None or record.batch_size == batch)
        and (not implementation or record.implementation in implementation)
    ]
    if not records:
        raise RTPurboError("no record is left to show; loosen the filters or pass other files.")
    if not markdown:
        _show(SpeedResults(records), plot)
        return
    typer.echo(speed_markdown(records))
    if plot is not None:
        save_plot(records, plot)


def _rule(window: int, retrieval_window: int | None, row_stride: int | None = None) -> Any:
    from rtpurbo.config import AttentionRule

    rule = AttentionRule(
        sliding_window=window, retrieval_window=retrieval_window, prefill_mode="row_peak"
    )
    return rule if row_stride is None else replace(rule, row_stride=row_stride)


def _densities(given: Sequence[float] | None, default: float) -> list[float]:
    densities = list(given or [default])
    for density in densities:
        if not 0 < density <= 1:
            raise RTPurboError(f"--density is {density:g}, but it must be above 0 and at most 1.")
    return densities


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


@contextmanager
def _measuring(context: typer.Context, known: Sequence[str]) -> Iterator[Session]:
    """Checks a command's options before anything is measured; prints and plots the results at the end.

    `known` has the names for its option `--implementation`.
    """
    import torch

    from rtpurbo.benchmarks.session import Session
    from rtpurbo.devices import device_name, resolve_device
    from rtpurbo.reporting.figures import check_matplotlib
    from rtpurbo.speed_records import usual_times, write_speed

    options = context.params
    wanted, output, plot = options["implementation"] or (), options["output"], options.get("plot")
    for name in wanted:
        if name not in known:
            raise RTPurboError(
                f"there is no implementation '{name}' here; choose one of: {', '.join(known)}."
            )
    if plot is not None:
        check_matplotlib("--plot")
    if options["device"] == "cuda" and not torch.cuda.is_available():
        raise RTPurboError("benchmarks need an NVIDIA GPU, and PyTorch finds none here.")
    place = resolve_device(options["device"])
    command = shlex.join(["rtpurbo", *sys.argv[1:]])

    def write(results: SpeedResults) -> None:
        if output is not None:
            write_speed(output, device_name(place), command, results)

    session = Session(
        place,
        repeats=options["repeats"],
        time_limit=options["time_limit"],
        wanted=tuple(wanted),
        log=lambda text: typer.echo(text, err=True),
        on_record=write,
        usual=usual_times(options["earlier"]),
    )
    yield session
    _show(session.results, plot)


def _show(results: SpeedResults, plot: str | Path | None) -> None:
    """Prints and plots results; exits with 1 if a result was wrong."""
    from rich.console import Console

    from rtpurbo.reporting.speed import save_plot, speed_tables

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a log has room for all columns
    for table in speed_tables(results.records):
        console.print(table)
    for note in results.notes:
        typer.echo(f"note: {note}")
    if plot is not None and results.records:
        save_plot(results.records, plot)
    if results.errors:
        for error in results.errors:
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1)

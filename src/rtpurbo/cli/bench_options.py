"""Options of several benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rtpurbo.cli.options import optional
from rtpurbo.errors import RTPurboError

# Options of `bench model` for models with random weights, and for those of artifacts.
GEOMETRY_OPTIONS = (
    *("geometry", "layers", "prefill_density", "decode_density"),
    *("window", "retrieval_window", "row_stride"),
)
ARTIFACT_OPTIONS = ("data", "base_model")

Length = Annotated[
    list[int] | None,
    typer.Option(
        min=1,
        help="Context length in tokens. Repeat it for several.",
        show_default="8192, 32768, 131072",
    ),
]
Density = Annotated[
    list[float] | None,
    typer.Option(
        help="Forced density: share of the key blocks that retrieval heads read (prefill), or of the "
        "keys that they select (decode). Repeat it for several.",
        show_default="0.1 in prefill, 0.03 in decode",
    ),
]
Window = Annotated[int, typer.Option(min=64, help="Window of local heads, in tokens.")]
Windows = Annotated[
    list[int] | None,
    typer.Option(
        "--window",
        min=64,
        help="Window of local heads, in tokens. Repeat it for several.",
        show_default="8192",
    ),
]
RetrievalWindow = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Window of retrieval heads, in tokens.",
        show_default="512 in prefill, the window in decode",
    ),
]
RowStride = Annotated[int | None, optional(min=1, help="Score every n-th query of a prompt.")]
Geometry = Annotated[
    str, typer.Option(help="qwen3-8b, qwen3-30b-a3b or smollm2-135m, with random weights.")
]
Layers = Annotated[int | None, optional(min=1, help="Number of layers, instead of all.")]
Heads = Annotated[int, typer.Option(min=1, help="Query heads of the layer.")]
KeyValueHeads = Annotated[int, typer.Option("--kv-heads", min=1, help="KV heads of the layer.")]
HeadDim = Annotated[int, typer.Option(min=16, help="Dimensions of a head.")]
RetrievalHeads = Annotated[
    int, typer.Option(min=1, help="Retrieval heads of the layer, evenly spaced.")
]
Batch = Annotated[
    list[int] | None,
    typer.Option(min=1, help="Batch size. Repeat it for several.", show_default="1"),
]
Memory = Annotated[
    float | None,
    optional(
        min=1,
        help="Also measure decode steps of as many sequences as fit into this memory in GB, weights "
        "included: a larger batch in the sparse model than in the dense one.",
    ),
]
Dtype = Annotated[Literal["bfloat16", "float16"], typer.Option(help="Dtype of all states.")]
Implementation = Annotated[
    list[str] | None,
    typer.Option(
        help="Measure only this implementation. Repeat it for several.", show_default="all"
    ),
]
Repeats = Annotated[
    int, typer.Option(min=1, help="Timed calls; fewer if they take more than 3 seconds in total.")
]
TimeLimit = Annotated[
    float,
    typer.Option(
        min=0, help="Seconds; other implementations expected to take longer per call are skipped."
    ),
]
Output = Annotated[Path | None, optional("--output", "-o", help="JSON file for the results.")]
Plot = Annotated[
    Path | None, optional(help="Image file for a plot of the results; needs the extra `plots`.")
]
EARLIER = Path("benchmarks/results")
Earlier = Annotated[
    Path,
    typer.Option(
        help="Folder with results of earlier benchmarks. Dense kernels that are slower than they were "
        "there on this device are measured again, and flagged if their times stay far off."
    ),
]
Device = Annotated[str, typer.Option(hidden=True)]


def check_model_options(context: typer.Context) -> None:
    """Refuses options of `bench model` that have no meaning together, or without `--artifact`.

    Raises:
        RTPurboError: there is one.
    """
    has_artifact = context.params["artifact"] is not None
    if context.params["memory"] is not None and context.params["phase"] == "prefill":
        raise RTPurboError("--memory applies to decode steps only: remove it or --phase prefill.")
    for name in ARTIFACT_OPTIONS if not has_artifact else GEOMETRY_OPTIONS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = "--" + name.replace("_", "-")
            raise RTPurboError(
                f"{option} applies to random weights only: remove it or --artifact."
                if has_artifact
                else f"{option} needs the model of an artifact: name one with --artifact."
            )

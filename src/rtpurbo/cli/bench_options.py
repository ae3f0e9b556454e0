"""Options of several benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rtpurbo.cli.options import optional

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
Device = Annotated[str, typer.Option(hidden=True)]

"""`rtpurbo bench serve`."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any, Literal

import typer

from rtpurbo.cli import options
from rtpurbo.cli.bench_options import Output


def serve(
    context: typer.Context,
    artifact: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="Folder that `rtpurbo export --to vllm` wrote; or an artifact, which is exported first.",
        ),
    ],
    length: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Prompt length in tokens. Repeat it for several.",
            show_default="4096, 32768, 131072",
        ),
    ] = None,
    output_tokens: Annotated[
        list[int] | None,
        typer.Option(
            min=2, help="Answer length in tokens. Repeat it for several.", show_default="256"
        ),
    ] = None,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Largest number of requests at a time. Repeat it for several.",
            show_default="1, 8, 32",
        ),
    ] = None,
    request_rate: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="Mean arrivals per second of a Poisson process. Default: a request follows as soon as "
            "another one ends.",
            show_default=False,
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests per measurement. Default: twice the concurrency, at least four.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        Literal["both", "full", "rtpurbo"],
        typer.Option(help="Dense model on stock vLLM (full), sparse model (rtpurbo), or both."),
    ] = "both",
    data: Annotated[
        list[str] | None,
        options.optional(
            help="Text whose passages are the prompts, in the formats of `bench model --data`. Default: random tokens, "
            "in which an index selects other shares of the keys than in text."
        ),
    ] = None,
    base_model: options.BaseModel = None,
    output: Output = None,
) -> None:
    """Measure vLLM's server under load: the dense model, then the sparse one.

    `rtpurbo bench serve qwen3-8b-vllm --length 32768 --concurrency 8 -o serve.json`

    Starts a server for each and sends the same prompts to both with vLLM's own benchmark client. Every other option
    goes to both servers: --max-model-len, --max-num-seqs, --gpu-memory-utilization, ...
    """
    from rtpurbo.data.texts import load_texts
    from rtpurbo.serving.benchmark import POLICIES, Load, bench_serve
    from rtpurbo.serving.installation import find_vllm
    from rtpurbo.serving.server import ServerSettings, prepare_checkpoint

    installation = find_vllm()
    # Before an artifact is exported, which takes minutes.
    corpus = load_texts(list(data), "heldout") if data else None
    loads = [
        Load(prompt, answer, parallel, request_rate, requests)
        for prompt in length or [4096, 32768, 131072]
        for answer in output_tokens or [256]
        for parallel in concurrency or [1, 8, 32]
    ]
    records = bench_serve(
        prepare_checkpoint(artifact, base_model=base_model),
        ServerSettings(others=tuple(context.args)),
        installation,
        loads,
        policies=POLICIES if policy == "both" else [policy],
        corpus=corpus,
        command=shlex.join(["rtpurbo", *sys.argv[1:]]),
        output=output,
        log=lambda text: typer.echo(text, err=True),
    )
    _show(records)


def _show(records: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "policy",
        "prompt",
        "answer",
        "parallel",
        "TTFT ms (p99)",
        "TPOT ms (p99)",
        "tokens/s",
        "cache",
    )
    for record in records:
        first, each = "time_to_first_token_ms", "time_per_output_token_ms"
        table.add_row(
            record["policy"],
            f"{record['context_length']:,}",
            f"{record['output_tokens']:,}",
            f"{record['concurrency']}",
            f"{record[first]:.0f} ({record[first + '_p99']:.0f})",
            f"{record[each]:.2f} ({record[each + '_p99']:.2f})",
            f"{record['output_tokens_per_second']:.1f}",
            f"{record['cache_tokens'] or 0:,}",
        )
    Console().print(table)

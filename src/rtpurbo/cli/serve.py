"""`rtpurbo serve`."""

from __future__ import annotations

import shlex
from functools import partial
from typing import Annotated

import typer

from rtpurbo.cli import options

_ENGINE = "Engine"
_engine_option = partial(options.optional, rich_help_panel=_ENGINE)


def serve(
    context: typer.Context,
    artifact: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="Folder that `rtpurbo export --to vllm` wrote; or an artifact, by folder or Hub "
            "name, which is exported to the cache first.",
        ),
    ],
    max_model_len: Annotated[
        int | None,
        _engine_option(
            min=1,
            help="Longest request in tokens, prompt and answer. Default: the model's context.",
        ),
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None,
        _engine_option(
            min=1,
            help="Maximum number of tokens of a step; windowed caches have room for them, so a higher value "
            "costs capacity. Default: the window, from 512 to 2,048.",
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            "--tensor-parallel-size",
            "-tp",
            min=1,
            help="Number of devices for tensor parallelism.",
            rich_help_panel=_ENGINE,
        ),
    ] = 1,
    dtype: Annotated[
        str,
        typer.Option(
            help="Dtype, such as bfloat16 or float32; auto is 16 bits.",
            rich_help_panel=_ENGINE,
        ),
    ] = "auto",
    kv_cache_dtype: Annotated[
        str,
        typer.Option(
            help="Dtype of cached keys and values: auto for the model's dtype, or fp8.",
            rich_help_panel=_ENGINE,
        ),
    ] = "auto",
    cache_gib: Annotated[
        float | None,
        _engine_option(
            min=0,
            help="Memory for the KV cache, in GiB on each device. Default: the free memory of a GPU, or 4 "
            "without one.",
        ),
    ] = None,
    base_model: options.BaseModel = None,
    print_command: Annotated[
        bool,
        typer.Option(
            "--print-command", help="Print vLLM's command instead of running it; needs no vLLM."
        ),
    ] = False,
) -> None:
    """Serve a sparse model over HTTP with vLLM, with OpenAI's interface.

    `rtpurbo serve smollm2-sparse --port 8000`

    Needs vLLM in the same environment. Every other option goes to vLLM as it is: --host, --port,
    --api-key, --served-model-name, --max-num-seqs, ... (all of them: `vllm serve --help`).
    """
    from rtpurbo.serving.installation import find_vllm
    from rtpurbo.serving.server import (
        GIB,
        ServerSettings,
        become_server,
        prepare_checkpoint,
        served_capacity,
        served_name,
        server_command,
    )

    # First, because an export may take minutes.
    installation = find_vllm(required=not print_command)
    settings = ServerSettings(
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        tensor_parallel_size=tensor_parallel_size,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        cache_bytes=None if cache_gib is None else int(cache_gib * GIB),
        others=tuple(context.args),
    )
    checkpoint = prepare_checkpoint(artifact, base_model=base_model)
    command = server_command(checkpoint, served_name(artifact), settings, installation)
    typer.echo(served_capacity(checkpoint, settings, installation), err=True)
    if print_command:
        typer.echo(shlex.join(command))
        return
    become_server(command)

"""`rtpurbo chat`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from rtpurbo.cli import options

_sampling_option = partial(options.optional, rich_help_panel="How tokens are drawn")


def chat(
    artifact: options.Artifact,
    system: Annotated[str | None, options.optional(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 512,
    show_reads: Annotated[
        bool,
        typer.Option(
            "--show-reads",
            help="Show after each answer how many tokens heads read and the size of the cache, "
            "beside the dense model. Slows a GPU down.",
        ),
    ] = False,
    temperature: Annotated[
        float | None,
        _sampling_option(
            min=0, help="0 takes the likeliest token. Left out: what the model's own settings say."
        ),
    ] = None,
    sampling_top_p: Annotated[
        float | None,
        _sampling_option(
            min=0,
            max=1,
            help="Draw from the likeliest tokens that have this much probability together.",
        ),
    ] = None,
    sampling_top_k: Annotated[
        int | None, _sampling_option(min=1, help="Draw from so many of the likeliest tokens.")
    ] = None,
    seed: options.Seed = 0,
    base_model: options.BaseModel = None,
    device: options.Device = "auto",
) -> None:
    """Talk with a sparse model in the terminal.

    `rtpurbo chat smollm2-sparse --system "Answer in one sentence."`

    The cache is kept between turns, so that only what is new is read. /reset begins a new
    conversation, /quit leaves, and Ctrl-C stops an answer. Takes exports for vLLM and transformers
    as well as artifacts.
    """
    from rich.console import Console
    from transformers import set_seed

    from rtpurbo.cli.terminal import chat
    from rtpurbo.devices import default_dtype, resolve_device
    from rtpurbo.models.artifact import load
    from rtpurbo.serving.chat import Conversation, Sampling

    place = resolve_device(device)
    model, tokenizer = load(
        artifact, base_model=base_model, device=place, dtype=default_dtype(place)
    )
    set_seed(seed)
    conversation = Conversation(
        model,
        tokenizer,
        system=system,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, sampling_top_p, sampling_top_k),
        count_reads=show_reads,
    )
    chat(conversation, Console(highlight=False), show_reads=show_reads)

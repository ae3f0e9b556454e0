"""`rtpurbo chat`."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from rtpurbo.cli import options

_sampling_option = partial(options.optional, rich_help_panel="Sampling")


def chat(
    artifact: options.Artifact,
    system: Annotated[str | None, options.optional(help="System message.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens of an answer.")
    ] = 512,
    show_reads: Annotated[
        bool,
        typer.Option(
            "--show-reads",
            help="Show after each answer the tokens read per retrieval head and the size of the cache, "
            "compared with the dense model. Slows a GPU down.",
        ),
    ] = False,
    temperature: Annotated[
        float | None,
        _sampling_option(
            min=0, help="Sampling temperature; 0 is greedy. Default: the model's own setting."
        ),
    ] = None,
    sampling_top_p: Annotated[
        float | None,
        _sampling_option(
            min=0,
            max=1,
            help="Probability mass of nucleus sampling.",
        ),
    ] = None,
    sampling_top_k: Annotated[
        int | None, _sampling_option(min=1, help="Number of most likely tokens to sample from.")
    ] = None,
    seed: options.Seed = 0,
    base_model: options.BaseModel = None,
    device: options.Device = "auto",
) -> None:
    """Chat with a sparse model in the terminal.

    `rtpurbo chat smollm2-sparse --system "Answer in one sentence."`

    The cache is kept between turns, so that only new tokens are processed. /reset starts a new
    conversation, /quit exits, and Ctrl-C stops an answer. Exports for vLLM and transformers can be used
    like artifacts.
    """
    from rich.console import Console
    from transformers import set_seed

    from rtpurbo.cli.terminal import chat
    from rtpurbo.devices import default_dtype, resolve_device
    from rtpurbo.models.artifact import load
    from rtpurbo.serving.chat import Conversation

    place = resolve_device(device)
    model, tokenizer = load(
        artifact, base_model=base_model, device=place, dtype=default_dtype(place)
    )
    set_seed(seed)
    conversation = Conversation(
        model,
        tokenizer,
        system=system,
        count_reads=show_reads,
        max_new_tokens=max_new_tokens,
        **_sampling(temperature, sampling_top_p, sampling_top_k),
    )
    chat(conversation, Console(highlight=False), show_reads=show_reads)


def _sampling(
    temperature: float | None, top_p: float | None, top_k: int | None
) -> dict[str, bool | float | None]:
    """Returns arguments for `generate`; options that were not given keep the model's settings."""
    values = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    if temperature == 0:
        # Sampling settings of the model would cause a warning.
        return {"do_sample": False, **dict.fromkeys(values)}
    given = {name: value for name, value in values.items() if value is not None}
    return {"do_sample": True, **given} if given else {}

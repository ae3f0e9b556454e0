"""`rtpurbo generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rtpurbo.cli import options


def generate(
    artifact: options.Artifact,
    prompt: Annotated[str, typer.Argument(help="Text; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of new tokens.")] = 256,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample instead of greedy decoding.")
    ] = False,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Answer the prompt as a message, or continue its text. "
            "Default: answer if the model has a chat template.",
            show_default=False,
        ),
    ] = None,
    base_model: options.BaseModel = None,
    device: options.Device = "auto",
) -> None:
    """Generate text with a sparse model, streamed.

    `rtpurbo generate smollm2-sparse - --max-new-tokens 100 < long-question.txt`
    """
    from rtpurbo.devices import default_dtype, resolve_device
    from rtpurbo.models.artifact import load
    from rtpurbo.models.text import generate_text

    place = resolve_device(device)
    model, tokenizer = load(
        artifact, base_model=base_model, device=place, dtype=default_dtype(place)
    )
    generate_text(
        model,
        tokenizer,
        sys.stdin.read() if prompt == "-" else prompt,
        max_new_tokens=max_new_tokens,
        sample=sample,
        chat=chat,
        stream=True,
    )

"""`rtpurbo chat`."""

from __future__ import annotations

import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from rtpurbo.cli import options
from rtpurbo.errors import RTPurboError
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly
from rtpurbo.visible import visible

if TYPE_CHECKING:
    from rtpurbo.serving.chat import Conversation

COMMANDS = """/reset  start a new conversation
/quit   exit (also Ctrl-D)
/help   list the commands"""

_note = partial(typer.secho, dim=True)
_sample = partial(options.optional, rich_help_panel="Sampling")


def chat(
    artifact: options.Artifact,
    system: Annotated[str | None, options.optional(help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum tokens of an answer.")] = 512,
    show_reads: Annotated[
        bool,
        typer.Option(
            "--show-reads",
            help="Show after each answer the tokens read per retrieval head and the size of the cache, "
            "compared with the dense model. Slows a GPU down.",
        ),
    ] = False,
    temperature: Annotated[float | None, _sample(min=0, help="Temperature; 0 is greedy.")] = None,
    sampling_top_p: Annotated[
        float | None, _sample(min=0, max=1, help="Probability mass of nucleus sampling.")
    ] = None,
    sampling_top_k: Annotated[
        int | None, _sample(min=1, help="Number of most likely tokens to sample from.")
    ] = None,
    seed: options.Seed = 0,
    base_model: options.BaseModel = None,
    device: options.Device = "auto",
) -> None:
    """Chat with a sparse model in the terminal.

    `rtpurbo chat smollm2-sparse --system "Answer in one sentence."`

    The cache is kept between turns, so that only new tokens are processed. /reset starts a new
    conversation, /quit exits, and Ctrl-C stops an answer. Without sampling options, the model's own
    settings apply. Exports for vLLM and transformers can be used like artifacts.
    """
    from transformers import set_seed

    from rtpurbo.devices import default_dtype, resolve_device
    from rtpurbo.models.artifact import load
    from rtpurbo.serving.chat import Conversation

    place = resolve_device(device)
    loaded = load(artifact, base_model=base_model, device=place, dtype=default_dtype(place))
    set_seed(seed)
    sampling = {"temperature": temperature, "top_p": sampling_top_p, "top_k": sampling_top_k}
    if temperature == 0:  # sampling settings of the model would cause a warning
        sampling = {"do_sample": False, **dict.fromkeys(sampling)}
    elif sampling := {name: value for name, value in sampling.items() if value is not None}:
        sampling["do_sample"] = True
    conversation = Conversation(
        *loaded, system=system, count_reads=show_reads, max_new_tokens=max_new_tokens, **sampling
    )
    _talk(conversation)


def _talk(conversation: Conversation) -> None:
    """Answers messages from standard input until the user quits or the input ends."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401  # line editing and history

        _note("Ctrl-C stops an answer; /help lists the commands.")
    while True:
        try:
            message = input("> " if at_terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            _note("\n/quit or Ctrl-D exits.")
            continue
        if message == "/quit":
            return
        if message == "/reset":
            conversation.reset()
            _note("A new conversation.")
        elif message.startswith("/"):
            unknown = "" if message == "/help" else f"There is no command {message}.\n"
            _note(unknown + COMMANDS)
        elif message:
            _answer(conversation, message)


def _answer(conversation: Conversation, message: str) -> None:
    """Streams an answer; Ctrl-C stops it, and its beginning stays in the conversation."""
    from rtpurbo.models.text import VisibleStreamer

    try:
        with stopping_cleanly():
            conversation.answer(message, VisibleStreamer(conversation.tokenizer))
    except StoppedBySignalError as error:
        if error.number != signal.SIGINT:
            raise
        _note("(stopped)")
    except RTPurboError as error:
        typer.echo(visible(f"error: {error}"))
    if conversation.count_reads and conversation.last_answer:
        _note(str(conversation.last_answer))

"""Chat in the terminal."""

from __future__ import annotations

import signal
import sys

from rich.console import Console

from rtpurbo.errors import RTPurboError
from rtpurbo.formats import percent, short_bytes
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly
from rtpurbo.models.text import VisibleStreamer
from rtpurbo.serving.chat import Answer, Conversation
from rtpurbo.visible import visible

COMMANDS = {
    "/reset": "start a new conversation",
    "/quit": "exit (also Ctrl-D)",
    "/help": "list the commands",
}


def chat(conversation: Conversation, console: Console, *, show_reads: bool = False) -> None:
    """Runs the chat until the user quits or the input ends; messages come from standard input.

    Ctrl-C stops an answer; its beginning stays in the conversation.
    """
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401  # line editing and history

        console.print("Ctrl-C stops an answer; /help lists the commands.", style="dim")
    while True:
        try:
            message = input("> " if at_terminal else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            console.print("\n/quit or Ctrl-D exits.", style="dim")
            continue
        if message == "/quit":
            return
        if message == "/reset":
            conversation.reset()
            console.print("A new conversation.", style="dim")
        elif message.startswith("/"):
            if message != "/help":
                console.print(f"There is no command {message}.", style="dim", markup=False)
            for command, meaning in COMMANDS.items():
                console.print(f"{command}  {meaning}", style="dim")
        elif message:
            _answer(conversation, console, message)
            if show_reads and conversation.last_answer is not None:
                console.print(describe(conversation.last_answer), style="dim")


def describe(answer: Answer) -> str:
    """Describes an answer in one line."""
    text = (
        f"{answer.prompt_tokens:,} tokens of conversation, {answer.reused_tokens:,} of them cached "
        f"before; {answer.new_tokens:,} generated; "
    )
    if answer.tokens_read is not None:
        text += (
            f"a retrieval head read {answer.tokens_read:,.0f} of {answer.dense_tokens_read:,.0f} tokens "
            f"({percent(answer.tokens_read / answer.dense_tokens_read)}); "
        )
    text += (
        f"the cache takes {short_bytes(answer.cache_bytes)}, the dense model's "
        f"{short_bytes(answer.dense_cache_bytes)}"
    )
    return f"[{text}]"


def _answer(conversation: Conversation, console: Console, message: str) -> None:
    try:
        with stopping_cleanly():
            conversation.answer(message, VisibleStreamer(conversation.tokenizer))
    except KeyboardInterrupt as error:
        if isinstance(error, StoppedBySignalError) and error.number != signal.SIGINT:
            raise
        console.print("(stopped)", style="dim")
    except RTPurboError as error:
        console.print(visible(f"error: {error}"), markup=False)

"""Command line: one file for each command, without logic besides printing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from rtpurbo.cli import bench
from rtpurbo.cli.chat import chat
from rtpurbo.cli.convert import convert
from rtpurbo.cli.demo import demo
from rtpurbo.cli.evaluate import evaluate
from rtpurbo.cli.export import export
from rtpurbo.cli.generate import generate
from rtpurbo.cli.inspect import inspect
from rtpurbo.cli.push import push
from rtpurbo.cli.report import report
from rtpurbo.cli.serve import serve
from rtpurbo.cli.stages import calibrate, distill, train_indexer
from rtpurbo.errors import RTPurboError
from rtpurbo.launch import is_first_process_of_its_machine, started_by_torchrun
from rtpurbo.version import __version__
from rtpurbo.visible import visible

OUT_OF_MEMORY = (
    "out of memory: use shorter sequences (--length), a smaller model, or another --device "
    "(a GPU with more memory, or cpu)."
)

STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a job that a signal stopped."""


class CommandGroup(TyperGroup):
    """Group of commands whose expected errors print one sentence and exit with code 1.

    A command that a signal stopped exits with 128 plus the signal's number.
    """

    def invoke(self, ctx: Any) -> Any:
        """Runs a command."""
        try:
            return super().invoke(ctx)
        except RTPurboError as error:
            message, code = f"error: {error}", 1
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            message, code = f"error: {OUT_OF_MEMORY}", 1
        except KeyboardInterrupt as error:
            code = getattr(error, "exit_code", 0)
            if not code:
                raise
            message = str(error)
        if is_first_process_of_its_machine():
            typer.echo(visible(message), err=True)
        raise typer.Exit(code)


def _is_out_of_memory(error: Exception) -> bool:
    # By name, so that torch is not imported.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "DefaultCPUAllocator: can't allocate" in str(error)
    )


PANELS: dict[str, dict[str, Callable[..., None]]] = {
    "Start here": {"demo": demo, "convert": convert},
    "Use and evaluate an artifact": {
        "chat": chat,
        "generate": generate,
        "eval": evaluate,
        "inspect": inspect,
        "report": report,
        "push": push,
    },
    "Serve it": {"export": export, "serve": serve},
    "Steps of a conversion": {
        "calibrate": calibrate,
        "train-indexer": train_indexer,
        "distill": distill,
    },
}
"""Commands by name and heading of the help."""

WITH_EXTRA_OPTIONS = {"serve"}
"""Commands that pass unknown options to another program."""

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _panel, _commands in PANELS.items():
    for _name, _command in _commands.items():
        _unknown = _name in WITH_EXTRA_OPTIONS
        _settings = {"allow_extra_args": _unknown, "ignore_unknown_options": _unknown}
        app.command(_name, rich_help_panel=_panel, context_settings=_settings)(_command)
app.add_typer(bench.app, name="bench", rich_help_panel="Measure speed")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rtpurbo {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Turn a full-attention language model sparse, with a few hundred training steps.

    Most attention heads need only a window and the first tokens. RTPurbo finds the heads that need the whole
    context and trains an index that selects which distant tokens they read.

    Try `rtpurbo demo`, or convert a model and use it:

    `rtpurbo convert MODEL --output-dir sparse`

    `rtpurbo generate sparse "Once upon a time"`
    """


def main() -> None:
    """Runs the command line."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Spinning threads of GNU OpenMP occupy the cores of a shared machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    try:
        app()
    except SystemExit as end:
        # After an error, other processes may wait for this one, so it must not wait for them.
        if started_by_torchrun() and end.code in (None, 0, *STOPPED):
            from rtpurbo.processes import shutdown_distributed

            shutdown_distributed()
        raise

"""Progress of downloads and decoding, in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from rtpurbo.launch import is_main_process
from rtpurbo.settings import Progress


@contextmanager
def shown_in_terminal(progress: Progress | None) -> Iterator[Progress]:
    """Yields `progress`, or in place of None one that draws bars on standard error.

    Nothing is drawn unless standard error is a terminal, nor by processes other than the main one.
    """
    if progress is not None:
        yield progress
        return
    console = Console(stderr=True)
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not (console.is_terminal and is_main_process()),
    )
    tasks = {}

    def show(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        if stage not in tasks:
            bars.start()  # most models need no bar
            tasks[stage] = bars.add_task(stage, total=total)
        bars.update(tasks[stage], completed=done)

    try:
        yield show
    finally:
        bars.stop()

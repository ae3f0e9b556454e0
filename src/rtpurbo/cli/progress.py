"""Progress bars with the time left and the latest figures."""

from __future__ import annotations

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rtpurbo.launch import is_main_process


def say(text: str) -> None:
    """Prints a line, unless this process is one of several and not the main one."""
    if is_main_process():
        typer.echo(text)


class ProgressBars:
    """Progress bar for each stage, to be passed as `progress`; only the main process draws.

    Args:
        console: console; standard error if None.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[figures]}"),
            console=console or Console(stderr=True),
            disable=not is_main_process(),
        )
        self._tasks: dict[str, TaskID] = {}
        self._finished: set[str] = set()
        self._began = self._progress.get_time()

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        """Updates the bar of a stage, which the first call creates."""
        written = "  ".join(_figure(name, value) for name, value in figures.items())
        if stage not in self._tasks:
            # Steps of an earlier run are ignored in the estimate of the remaining time.
            self._tasks[stage] = self._progress.add_task(
                stage, total=total, completed=max(0, done - 1), figures=written
            )
        self._progress.update(self._tasks[stage], completed=done, total=total, figures=written)
        if done >= total and stage not in self._finished:
            self._finished.add(stage)
            self._log_line(f"{stage} {done}/{total}  {written}")

    def _log_line(self, text: str) -> None:
        """Prints a line at the end of a stage if the output is not a terminal, which shows bars."""
        console = self._progress.console
        if not console.is_terminal:
            seconds = self._progress.get_time() - self._began
            console.print(f"{seconds:5.0f} s  {text}", markup=False, soft_wrap=True)


def _figure(name: str, value: float) -> str:
    """Formats a figure, such as "tokens/s 1,234"."""
    if name.endswith("_per_second"):
        return f"{name.removesuffix('_per_second')}/s {value:,.0f}"
    return f"{name.replace('_', ' ')} {value:.4g}"

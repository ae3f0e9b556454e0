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

    If the console is no terminal, such as a log file, it gets one line for each stage instead: when the stage
    is complete, or at the end if it is not or if its total was not known.

    Args:
        console: console; standard error if None.
    """

    def __init__(self, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._writes_lines = is_main_process() and not console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[figures]}"),
            console=console,
            disable=not (is_main_process() and console.is_terminal),
        )
        self._tasks: dict[str, TaskID] = {}
        self._written: dict[str, float] = {}
        self._began = self._progress.get_time()

    def __enter__(self) -> ProgressBars:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()
        for stage in self._tasks:
            self._write_line(stage)

    def __call__(self, stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        """Updates the bar of a stage, which the first call creates."""
        written = "  ".join(_figure(name, value) for name, value in figures.items())
        if stage not in self._tasks:
            # Steps of an earlier run are ignored in the estimate of the remaining time.
            self._tasks[stage] = self._progress.add_task(
                stage, total=total, completed=max(0, done - 1), figures=written
            )
        self._progress.update(self._tasks[stage], completed=done, total=total, figures=written)
        if done >= total > 0 and stage not in self._written:
            self._write_line(stage)

    def _write_line(self, stage: str) -> None:
        """Prints the state of a stage with the time since the beginning, if it is new and there are no bars."""
        [task] = (task for task in self._progress.tasks if task.id == self._tasks[stage])
        if self._writes_lines and self._written.get(stage) != task.completed:
            self._written[stage] = task.completed
            seconds = self._progress.get_time() - self._began
            text = f"{stage} {task.completed:.0f}/{task.total:.0f}  {task.fields['figures']}"
            line = f"{seconds:5.0f} s  {text}".rstrip()
            self._progress.console.print(line, markup=False, soft_wrap=True)


def _figure(name: str, value: float) -> str:
    """Formats a figure, such as "tokens/s 1,234"."""
    if name.endswith("_per_second"):
        return f"{name.removesuffix('_per_second')}/s {value:,.0f}"
    return f"{name.replace('_', ' ')} {value:.4g}"

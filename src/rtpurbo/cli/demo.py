"""`rtpurbo demo`."""

from __future__ import annotations

from pathlib import Path

from rtpurbo.cli import options


def demo(
    output_dir: options.OutputFolder = Path("rtpurbo-demo"),
    seed: options.Seed = 0,
    device: options.Device = "auto",
) -> None:
    """Convert a small model and compare it with the dense one.

    Takes minutes on two CPU cores.
    """
    from rich.console import Console

    from rtpurbo.cli.progress import ProgressBars
    from rtpurbo.demo import run_demo
    from rtpurbo.interruption import stopping_cleanly

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a log has room for the table
    with stopping_cleanly(), ProgressBars(console) as progress:
        run_demo(output_dir, device=device, seed=seed, progress=progress, console=console)

"""`rtpurbo report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    places: Annotated[
        list[str],
        typer.Argument(
            metavar="[ARTIFACT] [RESULT.json ...]",
            help="An artifact (its folder, or its name on the Hub), files of results that `rtpurbo "
            "eval -o` and `rtpurbo bench -o` wrote, or both.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path(
        "report.html"
    ),
) -> None:
    """Write an HTML report of an artifact and its results: tables, head map, plots, provenance.

    The report is a single file that needs no network.

    `rtpurbo report smollm2-sparse quality.json decode.json -o report.html`
    """
    from rtpurbo.reporting.html.page import write_report

    write_report(places, output)
    typer.echo(f"Written to {output}.")

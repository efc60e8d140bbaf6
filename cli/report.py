"""`specd report`: one HTML page about a run, or about several side by side, with charts and without outside assets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specd.drafts import registry

EXAMPLES = f"Examples: `specd report runs/{registry.DEFAULT}` · `specd report runs/first runs/second --to both.html`"


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Directories of runs, each the --output of a `specd train`.", metavar="RUN")
    ],
    to: Annotated[
        Path | None, typer.Option(help="File of the page [default: RUN/report.html, of several comparison.html].")
    ] = None,
) -> None:
    """Write RUN/report.html: loss, acceptance with its interval, where the time went, on what machine.

    Of several runs the page compares: figures side by side, gains over the first, curves, and what they differ in.
    """
    from specd.report.comparison import write_comparison
    from specd.report.run_report import write_report

    written = write_report(runs[0], to) if len(runs) == 1 else write_comparison(runs, to)
    typer.echo(f"report written to {written}")

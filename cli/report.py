"""`specd report`: one HTML page about a run, with pictures and without outside assets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from specd.drafts import registry

EXAMPLES = f"Example: `specd report runs/{registry.DEFAULT}`"


def report(
    run: Annotated[Path, typer.Argument(help="Directory of a run, the --output of `specd train`.", metavar="RUN")],
) -> None:
    """Write RUN/report.html: loss, acceptance by offset, where the time went, on what machine."""
    from specd.report.run_report import write_report

    typer.echo(f"report written to {write_report(run)}")

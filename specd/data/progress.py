"""A bar for the rows that are read, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(title: str, show: bool = True) -> Iterator[Callable[[int], None] | None]:
    """A callback for `prepare` that shows the rows read so far on a terminal, None where there is none."""
    if not show or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    counts = (TextColumn("{task.completed:,.0f} rows"), TextColumn("{task.fields[rate]}"))
    columns = (SpinnerColumn(), TextColumn(title), *counts)
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None, rate="")

        def on_rows(rows: int) -> None:
            elapsed = bar.tasks[0].elapsed or 0.0
            bar.update(task, completed=rows, rate=f"{rows / elapsed:,.0f} rows/s" if elapsed else "")

        yield on_rows

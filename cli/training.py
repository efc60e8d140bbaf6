"""What `specd train` and `specd resume` share: training, and what can be done next."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from specd.cli.hosting import check_link, hosted
from specd.config.settings import RunConfig
from specd.errors import SpecdError

if TYPE_CHECKING:
    from specd.train.directory import RunDirectory


def go(
    settle: Callable[[str], RunConfig],
    first: RunConfig,
    *,
    model: str,
    preset: str = "",
    resume: bool,
    shown: Path | None = None,
) -> None:
    """Train to the end, and print what comes next; an interrupted run says how it goes on.

    settle: as in `train_draft`; first: for a target that is not known yet. model: hosted here, empty for a daemon's.
    shown: how the run's directory is called in what is printed, where that is not its output.
    """
    from specd.train.interrupt import Interrupt
    from specd.train.trainer import output_of, train_draft

    if model:
        check_link(first.subscriber, model)
    directory = output_of(first)
    run = shlex.quote(str(shown or directory.path))
    try:
        with Interrupt() as interrupt:
            host = hosted(first, model, preset, resume) if model else None
            done = train_draft(settle, host=host, resume=resume, interrupt=interrupt, show=True)
    except KeyboardInterrupt:
        typer.echo("specd: interrupted" + _remedy(directory, run), err=True)
        raise typer.Exit(130) from None
    except SpecdError as error:
        if _steps(directory):
            error.add_note(f"its draft so far: specd export {run}")
        raise
    state = "is finished" if done.was_finished else "finished"
    typer.echo(f"{run} {state}: {done.steps} steps trained; draft in {run}/draft")
    then(f"specd eval {run} --untrained", f"specd report {run}", f"specd export {run} --to DIR")


def then(*commands: str) -> None:
    """Print the commands that come next, one a line, as they are to be typed."""
    for number, command in enumerate(commands):
        typer.echo(("next:  " if number == 0 else "       ") + command)


def _remedy(directory: RunDirectory, run: str) -> str:
    """How an interrupted run goes on, and its draft is had."""
    if not directory.begun:
        return "; nothing was trained yet: give the same command again"
    steps = _steps(directory)
    draft = f"\nits draft: specd export {run}" if steps else ""
    return f"; {steps} steps are kept\ngo on:     specd resume {run}{draft}"


def _steps(directory: RunDirectory) -> int:
    """The step of a run's newest checkpoint, 0 if there is none."""
    from specd.train.checkpoint import finished_checkpoints

    kept = finished_checkpoints(directory.checkpoints) if directory.begun else []
    return kept[-1][0] if kept else 0

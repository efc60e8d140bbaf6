"""What `specd train` and `specd resume` share: training, and what can be done next."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from specd.cli.hosting import check_link, hosted
from specd.cli.ranks import as_rank, is_one_of_several
from specd.config.settings import RunConfig
from specd.errors import SpecdError

if TYPE_CHECKING:
    from specd.train.directory import RunDirectory
    from specd.train.distributed import Ranks
    from specd.train.interrupt import Interrupt
    from specd.train.trainer import TrainedRun


class Job(NamedTuple):
    """A run that is asked for.

    settle: as in `train_draft`; first: for a target that is not known yet. model: hosted here, empty for a daemon's.
    preset: whose recipe it takes, empty for the target's own. shown: how the run's directory is called in what is
    printed, where that is not its output.
    """

    settle: Callable[[str], RunConfig]
    first: RunConfig
    model: str
    preset: str = ""
    resume: bool = False
    shown: Path | None = None

    @property
    def directory(self) -> RunDirectory:
        from specd.train.asked import output_of

        return output_of(self.first)

    @property
    def run(self) -> str:
        """The run's directory as it is typed."""
        return shlex.quote(str(self.shown or self.directory.path))


def go(ask: Callable[[], Job]) -> None:
    """Train to the end, alone or as one of several ranks, and print what comes next.

    ask: what is asked for; where ranks have to agree on what is wrong, it is asked once they have met. An interrupted
    run says how it goes on.
    """
    job = functools.cache(ask)

    def work(ranks: Ranks | None, interrupt: Interrupt) -> None:
        from specd.train.trainer import train_draft

        asked = job()
        if asked.model:
            check_link(asked.first.subscriber, asked.model)
        host = hosted(asked.first, asked.model, asked.preset, asked.resume, ranks) if asked.model else None
        try:
            done = train_draft(
                asked.settle, host=host, resume=asked.resume, interrupt=interrupt, show=True, ranks=ranks
            )
        except SpecdError as error:
            if _steps(asked.directory):
                error.add_note(f"its draft so far: specd export {asked.run}")
            raise
        if ranks is None or ranks.leads:
            _say_done(done, asked.run)

    if is_one_of_several():
        as_rank(work, lambda: _interrupted(job()))
        return
    from specd.train.interrupt import Interrupt

    try:
        with Interrupt() as interrupt:
            work(None, interrupt)
    except KeyboardInterrupt:
        typer.echo(_interrupted(job()), err=True)
        raise typer.Exit(130) from None


def _say_done(done: TrainedRun, run: str) -> None:
    by = f" by {done.ranks} ranks" if done.ranks > 1 else ""
    state = "is finished" if done.was_finished else "finished"
    typer.echo(f"{run} {state}: {done.steps} steps trained{by}; draft in {run}/draft")
    then(f"specd eval {run} --untrained", f"specd report {run}", taken_away(run))


def taken_away(run: str) -> str:
    """The command that takes a run's draft to a place of its own. run: its directory as it is typed."""
    return f"specd export {run} --to {shlex.quote(f'drafts/{Path(shlex.split(run)[0]).absolute().name}')}"


def then(*commands: str) -> None:
    """Print the commands that come next, one a line, as they are to be typed."""
    for number, command in enumerate(commands):
        typer.echo(("next:  " if number == 0 else "       ") + command)


def _interrupted(job: Job) -> str:
    """What is said of an interrupted run: how it goes on, and its draft is had."""
    if not job.directory.begun:
        return "specd: interrupted; nothing was trained yet: give the same command again"
    steps = _steps(job.directory)
    draft = f"\nits draft: specd export {job.run}" if steps else ""
    specd = "torchrun … -m specd" if is_one_of_several() else "specd"
    return f"specd: interrupted; {steps} steps are kept\ngo on:     {specd} resume {job.run}{draft}"


def _steps(directory: RunDirectory) -> int:
    """The step of a run's newest checkpoint, 0 if there is none."""
    from specd.train.checkpoint import finished_checkpoints

    kept = finished_checkpoints(directory.checkpoints) if directory.begun else []
    return kept[-1][0] if kept else 0

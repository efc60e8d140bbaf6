"""`specd export`: the draft of a run or a checkpoint, in a directory of its own, ready to be served."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from specd.cli.training import then
from specd.drafts import registry
from specd.errors import ConfigError

EXAMPLES = (
    f"Examples: `specd export runs/{registry.DEFAULT}` · `specd export runs/{registry.DEFAULT} --to drafts/mine` · "
    f"`specd export runs/{registry.DEFAULT}/checkpoints/step-00000500 --to drafts/early`"
)


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run, or one of its checkpoints.")],
    to: Annotated[
        Path | None, typer.Option("--to", help="New directory for it; else draft-STEP in the run.", show_default=False)
    ] = None,
) -> None:
    """Take the draft of a run, finished or not, or of a checkpoint: no target and no daemon is needed.

    The directory holds what SGLang and vLLM read, a README with the commands that serve it, how it was trained and what
    `specd eval` measured, and specd.json, by which `specd eval` knows its target. Of a run the newest draft is taken;
    one that is finished has it in RUN/draft already.
    """
    from specd.train.export import export, find, refresh

    found = find(source)
    facts = found.facts
    if to is None and found.checkpoint is None and found.run is not None:
        refresh(found)
        place = found.directory
    else:
        place = to or _own_place(source, found.run, facts.step if facts else 0)
        export(found, place)
    if facts is None:
        typer.echo(f"draft in {place}")
    else:
        part = "" if facts.step >= facts.steps else f" of {facts.steps}"
        typer.echo(f"draft of step {facts.step}{part} in {place}")
    name = shlex.quote(str(place))
    then(f"specd eval {name}", f"specd push {name} OWNER/NAME", f"cat {name}/README.md   # the commands that serve it")


def _own_place(source: Path, run: Path | None, step: int) -> Path:
    if run is None:
        raise ConfigError(f"{str(source)!r} belongs to no run: give --to DIR for its draft")
    return run / f"draft-{step:08d}"

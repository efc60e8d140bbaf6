"""`specd resume RUN`: go on with a run by what its directory says, and nothing else."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from specd.cli.settings import given, servers_of
from specd.cli.training import Job, go
from specd.config.load import convert, merge, overrides
from specd.config.settings import RunConfig
from specd.drafts import registry
from specd.errors import ConfigError

EXAMPLES = (
    f"Examples: `specd resume runs/{registry.DEFAULT}` · `specd resume runs/{registry.DEFAULT} --epochs 10` · "
    f"`specd resume runs/{registry.DEFAULT} --endpoint tcp://gpu2:7070 --device cuda:1`"
)
log = logging.getLogger(__name__)


def resume(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run, the --output of `specd train`.")],
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs in all, in place of those planned.")] = None,
    max_steps: Annotated[
        int | None, typer.Option(min=0, help="Optimizer steps in all, in place of those planned; 0 for all epochs.")
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Minutes of training in all, in place of those planned; 0 for no limit."),
    ] = None,
    endpoint: Annotated[
        list[str] | None, typer.Option("--endpoint", "-e", help="A daemon elsewhere; give it again for more.")
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Host this target here: the same one, if it was moved.")
    ] = "",
    key: Annotated[str, typer.Option("--key", help="Over TCP: this trainer's key, by name or path.")] = "",
    server_key: Annotated[
        list[str] | None,
        typer.Option(
            "--server-key", help="Over TCP: a daemon's public key; one for all, or one each.", metavar="PUBLIC"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting that may change, e.g. --set train.save_every=100.")
    ] = None,
) -> None:
    """Go on with a run from its newest checkpoint, under the settings that it has.

    The same data and settings give the same weights, bit for bit, as if it had never stopped. What changes nothing that
    is computed may be given anew: daemons, device, data paths, loggers, save_every, keep, log_every. More or fewer
    epochs, steps or minutes are a new plan: the learning rate then follows it, a line says so, and a finished run
    trains on. Anything else is refused by name. Relative paths mean what they meant where the run was begun.
    """
    from specd.train.directory import FACTS, read_facts

    def job() -> Job:
        if not (run / FACTS).is_file():
            raise ConfigError(
                f"{str(run)!r} holds no run: expected the --output of a `specd train`, with {FACTS} in it"
            )
        facts = read_facts(run)
        flags = given(
            {
                "train": {"epochs": epochs, "max_steps": max_steps, "max_minutes": max_minutes, "device": device},
                "subscriber": {
                    "endpoints": endpoint,
                    "auth": {"key": key, "servers": servers_of(endpoint or [], server_key or [])},
                },
            }
        )
        asked: dict[str, Any] = merge(merge(facts.config, flags), overrides(settings or []))
        asked["output"] = str(run if Path(facts.directory) == Path.cwd() else run.absolute())
        target = asked.get("target") or {}
        if model and endpoint:
            raise ConfigError(
                f"--model {model} hosts the target here, --endpoint {endpoint[0]} uses a daemon: give one"
            )
        hosted = model or ("" if endpoint else str(target.get("model", "")))
        asked["target"] = {**target, "model": hosted} if hosted else {}
        if hosted:
            asked["subscriber"] = {**(asked.get("subscriber") or {}), "endpoints": ["auto"], "transport": "auto"}
        config = convert(asked, RunConfig, "settings")
        where.enter_context(_place(facts.directory))
        return Job(settle=lambda target: config, first=config, model=hosted, resume=True, shown=run)

    with contextlib.ExitStack() as where:
        go(job)


def _place(directory: str) -> contextlib.AbstractContextManager[None]:
    """The working directory that a run was begun in, where it is still there."""
    if not directory or Path(directory) == Path.cwd():
        return contextlib.nullcontext()
    if not Path(directory).is_dir():
        log.warning("%s, where the run was begun, is gone: relative paths are looked for here", directory)
        return contextlib.nullcontext()
    return contextlib.chdir(directory)

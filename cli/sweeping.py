"""A sweep under way: its daemon, its trainers side by side, what they come to, and how it goes on."""

from __future__ import annotations

import logging
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import typer
import yaml

from specd.cli.children import Children, ready
from specd.cli.fit import check_room, hosting, unlike
from specd.cli.settings import daemon_config
from specd.cli.training import then
from specd.config.load import merge
from specd.config.presets import run_config
from specd.config.settings import RunConfig
from specd.errors import ConfigError
from specd.protocol.limits import MAX_PAYLOAD_BYTES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from specd.protocol.contract import TargetContract

logger = logging.getLogger(__name__)
ASK_S = 5.0
"""Timeout of an answer of the daemon."""


class Trainer(NamedTuple):
    """One run. asked: its settings, as in a file for `specd train --config`. preset: whose recipe lies under them.

    device: that it trains on, once that is known.
    """

    name: str
    asked: Mapping[str, Any]
    preset: str
    device: str = ""

    def settle(self, target: str) -> RunConfig:
        """Its settings for a target of that name."""
        return run_config(self.asked, target, preset=self.preset)

    @property
    def first(self) -> RunConfig:
        return self.settle("")

    @property
    def about(self) -> str:
        """What it trains, where, for a table."""
        return f"{self.first.method}, {self.device}"

    @property
    def directory(self) -> Path:
        return Path(self.first.output)


def go(
    runs: Sequence[Trainer], target: Mapping[str, Any], place: Path, prompts: int, again: str, lag_gb: float = 0.0
) -> None:
    """Train all, evaluate if that is asked for, and print the table. lag_gb: lag window of a daemon of its own."""
    from rich.console import Console

    from specd.cli.fleet import Command, Fleet
    from specd.cli.standings import Standing, saved, table
    from specd.train.interrupt import Interrupt
    from specd.train.owner import owned

    console = Console(highlight=False, markup=False, soft_wrap=False)
    standings = [Standing(run.name, run.about, run.directory) for run in runs]
    interrupted = False
    with ExitStack() as stack:
        stack.enter_context(owned(place))
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="specd-")))
        interrupt = stack.enter_context(Interrupt())
        children = stack.enter_context(Children(interrupt))
        shown = stack.enter_context(_live(console, partial(table, standings)))
        fleet = Fleet(children, partial(console.print, soft_wrap=True), shown)
        try:
            endpoint = _daemon(runs, target, lag_gb, children, place, scratch) if target else ""
            if not endpoint:
                for line in see_daemons(runs):
                    logger.warning("%s", line)
            files = [_file(run, scratch, endpoint) for run in runs]
            fleet.run(
                [
                    Command(
                        standing,
                        ["train", run.first.method, "--config", str(path), "--resume", *_preset(run)],
                        place / f"{run.name}.log",
                    )
                    for run, standing, path in zip(runs, standings, files, strict=True)
                ],
                "training",
            )
            for run, standing in zip(runs, standings, strict=True):
                if prompts and standing not in fleet.failed:
                    asked = ["eval", str(run.directory), "--limit", str(prompts), "--device", run.device]
                    fleet.run([Command(standing, asked, place / f"{run.name}.log")], "evaluating")
        except KeyboardInterrupt:
            interrupted = True
    console.print(table(standings))
    console.print(saved(standings), soft_wrap=True)
    trained = [shlex.quote(str(each.directory)) for each in standings if each.totals.steps]
    if interrupted or fleet.failed:
        typer.echo(f"go on:     {again}", err=interrupted)
    if trained and not interrupted:
        then(f"specd report {' '.join(trained)}", *([] if prompts else [f"specd eval {each}" for each in trained]))
    if interrupted or fleet.failed:
        raise typer.Exit(130 if interrupted else 1)


@contextmanager
def _live(console: Console, drawn: Callable[[], Table]) -> Iterator[Callable[[], None]]:
    """A table that stays below all lines, on a terminal; yields what draws it anew."""
    if not console.is_terminal:
        yield lambda: None
        return
    from rich.live import Live

    with Live(drawn(), console=console, auto_refresh=False, transient=True) as live:
        yield lambda: live.update(drawn(), refresh=True)


def see_daemons(runs: Sequence[Trainer]) -> list[str]:
    """See that each daemon has room for all runs; returns which of these share nothing, and why.

    Raises DaemonError where none answers, ConfigError as `check_room` does.
    """
    from specd.client.ask import ask_status
    from specd.client.line import identity
    from specd.endpoints import resolve_endpoint

    asking: dict[str, list[Trainer]] = {}
    apart: list[str] = []
    for run in runs:
        for endpoint in run.first.subscriber.endpoints:
            asking.setdefault(endpoint, []).append(run)
    for endpoint, askers in asking.items():
        auth = askers[0].first.subscriber.auth
        report = ask_status(endpoint, ASK_S, identity(auth, [endpoint]) if auth else None)
        known = {run.name: run.settle(report.contract.model if report.contract else "") for run in askers}
        check_room(report, known, resolve_endpoint(endpoint))
        if endpoint in runs[0].first.subscriber.endpoints[:1]:
            apart += unlike(known)
    return apart


def _daemon(
    runs: Sequence[Trainer], target: Mapping[str, Any], lag_gb: float, children: Children, place: Path, scratch: Path
) -> str:
    """Start a daemon for these runs alone; its endpoint. Raises ConfigError, DaemonError where it does not start."""
    known = {run.name: run.settle(str(target["model"])) for run in runs}
    endpoint = f"ipc://{scratch}/d.sock"
    asked = hosting(known, _contract(target)) | {"target": dict(target), "endpoint": endpoint}
    asked["ring"]["lag_gb"] = lag_gb
    asked["ring"]["payload_mib"] = MAX_PAYLOAD_BYTES >> 20  # nobody else asks this daemon
    config = daemon_config(asked, {}, [], preset=runs[0].preset, where="sweep")
    for line in unlike(known):
        logger.warning("%s", line)
    path, log = scratch / "daemon.yaml", place / "daemon.log"
    path.write_text(yaml.safe_dump(msgspec.to_builtins(config)))
    with open(log, "ab") as said:
        child = children.start(["start", "--config", str(path)], signal.SIGINT, stdout=subprocess.PIPE, stderr=said)
    typer.echo(ready(child, log))
    return endpoint


def _contract(target: Mapping[str, Any]) -> TargetContract | None:
    """What the target's config.json says of it, None of one that has none, or is cut."""
    from specd.targets.source import pick_dtype, resolve
    from specd.train.rehearsal import contract_of

    if target.get("num_layers"):
        return None
    try:
        source = resolve(str(target["model"]), need="shape")
        dtype = str(pick_dtype(str(target.get("dtype", "auto")), source)).removeprefix("torch.")
        return contract_of(source.name, source.config, dtype)
    except ConfigError:  # not of a checkpoint: what its backend says of it is said by the daemon
        return None


def _file(run: Trainer, scratch: Path, endpoint: str) -> Path:
    """A file with all settings of a run, for `specd train --config`."""
    link = {"subscriber": {"endpoints": [endpoint]}} if endpoint else {}
    path = scratch / f"{run.name}.yaml"
    path.write_text(yaml.safe_dump(merge(dict(run.asked), link)))
    return path


def _preset(run: Trainer) -> list[str]:
    return ["--preset", run.preset] if run.preset else []

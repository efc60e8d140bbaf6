"""`specd sweep FILE`: several drafts from one target at once, which share its forwards, and one table of them."""

from __future__ import annotations

import hashlib
import logging
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from specd.cli.dry_run import rehearsed
from specd.cli.fit import unlike
from specd.cli.settings import complete_preset, given, servers_of
from specd.cli.sweeping import Trainer, go, see_daemons
from specd.cli.training import Job
from specd.config.load import merge, overrides
from specd.config.presets import recipe_of
from specd.config.settings import RunConfig
from specd.config.sweep import read_sweep
from specd.errors import ConfigError, DaemonError, SpecdError

logger = logging.getLogger(__name__)
EXAMPLES = (
    "Examples: `specd sweep drafts.yaml -e ipc:///tmp/specd.sock` · `specd sweep drafts.yaml --devices 1,2,3 "
    "--eval-prompts 40` · `specd sweep drafts.yaml --model smollm2-135m --set train.max_minutes=10`"
)


def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML with `base` settings and `runs` by name.")],
    endpoint: Annotated[
        list[str] | None, typer.Option("--endpoint", "-e", help="A daemon; give it again for more.")
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            help="Start a daemon with this target for these runs alone.",
            autocompletion=complete_preset,
        ),
    ] = "",
    preset: Annotated[
        str,
        typer.Option(
            "--preset", help="Take this preset's recipes; else the target's own.", autocompletion=complete_preset
        ),
    ] = "",
    devices: Annotated[
        str, typer.Option(help="Dealt to the runs in turn: 0,1,2 for GPUs, or cpu. [default: train.device]")
    ] = "",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory of the runs; else runs/ and FILE's name.")
    ] = None,
    eval_prompts: Annotated[
        int, typer.Option(min=0, help="Then decode N prompts with each draft: acceptance with its interval.")
    ] = 0,
    lag_gb: Annotated[
        float, typer.Option(min=0, help="With --model: GB in which its daemon keeps what a slower run still needs.")
    ] = 0.0,
    key: Annotated[str, typer.Option("--key", help="Over TCP: the trainers' key, by name or path.")] = "",
    server_key: Annotated[
        list[str] | None,
        typer.Option(
            "--server-key", help="Over TCP: a daemon's public key; one for all, or one each.", metavar="PUBLIC"
        ),
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of all runs, e.g. --set train.max_minutes=10.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the runs that are there, begin the others.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all runs, print sizes and steps; nothing begins.")
    ] = False,
) -> None:
    """Train several drafts on one target at once, and print one table of loss, acceptance and speed.

    FILE has `base`, settings of all runs, and `runs`, those of each by its name; any setting of `specd train`, a
    `method` among them, and paths as keys: `runs: {a: {method: eagle3}, b: {method: dflash, draft.num_taps: 5}}`.
    Each run is a `specd train` of its own, in OUTPUT/NAME, with a log beside it. They share the target's forwards where
    they train on the same batches. One that fails leaves the others alone; Ctrl-C and SIGTERM have each save, and
    --resume goes on.
    """
    place = output or Path("runs") / file.stem
    flags = {
        "subscriber": {
            "endpoints": endpoint,
            "auth": {"key": key, "servers": servers_of(endpoint or [], server_key or [])},
        }
    }
    asked = read_sweep(file, merge(given(flags), overrides(settings or [])))
    target: dict[str, Any] = dict(next(iter(asked.values())).get("target") or {})
    hosted = model or ("" if endpoint else str(target.get("model", "")))
    if hosted and endpoint:
        raise ConfigError(f"--model {hosted} starts a daemon here, --endpoint {endpoint[0]} uses one: give one")
    if target and not hosted:
        raise ConfigError(
            f"sweep {str(file)!r}: target={target}: expected none, as a daemon's target is configured by `specd "
            f"start`; leave it out, or give --model NAME to start a daemon here"
        )
    for name, own in asked.items() if hosted else ():
        if named := own.get("subscriber", {}).get("endpoints"):
            raise ConfigError(
                f"run {name}: --model {hosted} starts a daemon here, subscriber.endpoints={named} uses others: give one"
            )
    if lag_gb and not hosted:
        raise ConfigError(
            f"--lag-gb {lag_gb:g}: expected --model beside it, as it is of a daemon that is started here; of one that "
            "runs, specd start has --lag-gb"
        )
    recipe = recipe_of(preset, "") if preset else None
    target = (recipe.target if recipe else {}) | target | ({"model": hosted} if hosted else {})
    runs = [
        Trainer(name, _placed(own, place, name, device), preset)
        for (name, own), device in zip(asked.items(), _dealt(devices, len(asked)), strict=True)
    ]
    runs = _checked(runs, resume)
    if dry_run:
        _rehearse(runs, target, resume)
        return
    options: dict[str, Sequence[str]] = {
        "-e": endpoint or [],
        "-m": [model],
        "--preset": [preset],
        "--devices": [devices],
        "-o": [str(output or "")],
        "--lag-gb": [f"{lag_gb:g}" if lag_gb else ""],
        "--eval-prompts": [str(eval_prompts or "")],
        "--key": [key],
        "--server-key": server_key or [],
        "--set": settings or [],
    }
    go(runs, target, place, eval_prompts, _again(file, options), lag_gb)


def _again(file: Path, options: Mapping[str, Sequence[str]]) -> str:
    """The command that goes on, to be typed. options: their values by name; empty ones were not given."""
    parts = (part for name, values in options.items() for value in values if value for part in (name, value))
    return shlex.join(["specd", "sweep", str(file), *parts, "--resume"])


def _placed(own: Mapping[str, Any], place: Path, name: str, device: str) -> dict[str, Any]:
    """The settings of a run that its trainer gets."""
    kept = {key: value for key, value in own.items() if key != "target"}
    known = hashlib.blake2b(str(place.resolve()).encode(), digest_size=3).hexdigest()
    shared = {"subscriber": {"share": f"{place.resolve().name[:80]}-{known}"}}  # one that is named stays
    return merge(merge(shared, kept), {"output": str(place / name), "train": {"device": device} if device else {}})


def _dealt(devices: str, count: int) -> list[str]:
    """A device for each run, empty where nothing was said. Raises ConfigError for what names none."""
    names = [name.strip() for name in devices.split(",") if name.strip()]
    found = [f"cuda:{name}" if name.isdecimal() else name for name in names]
    for name in found:
        if name != "cpu" and not (name.startswith("cuda:") and name[5:].isdecimal()):
            raise ConfigError(f"--devices {devices}: {name!r} is no device: expected numbers of GPUs, as 0,1,2, or cpu")
    return [found[number % len(found)] if found else "" for number in range(count)]


def _checked(runs: Sequence[Trainer], resume: bool) -> list[Trainer]:
    """The runs with their devices, once every one can begin; nothing is made. Raises SpecdError that names the run."""
    import torch

    from specd.train.asked import check, output_of, see_init

    found = []
    for run in runs:
        with _of(run):
            found.append(run._replace(device=check(run.first)))
            see_init(run.first)
            directory = output_of(run.first)
            if directory.begun and not resume:
                raise ConfigError(f"{str(directory.path)!r} exists: go on with --resume, or choose another --output")
            if directory.path.exists():
                directory.check(resume)
    if {run.device for run in found} == {"cuda"} and torch.cuda.device_count() > 1 and len(found) > 1:
        logger.warning("all runs train on the first GPU here; --devices 0,1 deals them to two, for instance")
    return found


@contextmanager
def _of(run: Trainer) -> Iterator[None]:
    """Errors inside name the run."""
    try:
        yield
    except SpecdError as error:
        raise type(error)(f"run {run.name}: {error}") from None


def _rehearse(runs: Sequence[Trainer], target: Mapping[str, Any], resume: bool) -> None:
    """Check and print what each run takes, and what they want of a daemon together."""
    from rich.console import Console
    from rich.table import Table

    rows = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for number, figure in enumerate(("run", "draft", "device", "steps", "batches", "layers", "parameters")):
        rows.add_column(figure, justify="right" if number > 2 else "left", overflow="fold")
    found: dict[str, RunConfig] = {}
    taps: set[int] = set()
    final = False
    if not target:
        with suppress(DaemonError):  # what is not there yet is not looked at
            see_daemons(runs)
    for run in runs:

        def settle(name: str, run: Trainer = run) -> RunConfig:
            return msgspec.structs.replace(run.settle(name or str(target.get("model", ""))), target=dict(target))

        with _of(run):
            one = rehearsed(Job(settle, settle(""), str(target.get("model", "")), run.preset, resume))
        found[run.name] = run.settle(one.target)
        layers = ", ".join(map(str, one.taps)) + ", final" * one.final
        steps = f"{one.steps:,}" + f", {one.max_minutes:g} min" * bool(one.max_minutes)
        rows.add_row(
            run.name,
            one.method,
            one.device,
            steps,
            f"{one.batches:,}",
            layers.removeprefix(", "),
            f"{one.parameters:,}",
        )
        taps |= {*one.taps}
        final |= one.final
    Console(highlight=False).print(rows)
    for line in unlike(found):
        typer.echo(f"note: {line}")
    typer.echo(f"together {len(taps)} layers{' and the final state' * final}; nothing was loaded, nothing was written")

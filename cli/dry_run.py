"""`--dry-run` of `specd train`: the checks, the sizes and the steps of a run, without its target."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from specd import units
from specd.cli.hosting import laid_out
from specd.cli.training import Job
from specd.config.settings import RunConfig
from specd.errors import ConfigError, DaemonError

if TYPE_CHECKING:
    from specd.targets.source import Source
    from specd.train.rehearsal import Rehearsal


def rehearsed(job: Job) -> Rehearsal:
    """Check a run. A daemon is asked for its target if it is there."""
    from specd.targets.source import pick_dtype
    from specd.train.rehearsal import rehearse

    first = job.first
    source = _source(job.model or _of_daemon(first) or job.preset, first)
    name = source.name
    asked = str(first.target.get("dtype", "auto"))
    dtype = str(pick_dtype(asked, source)).removeprefix("torch.")
    with laid_out(source) as files:
        return rehearse(job.settle, name, source.config, files, dtype, resume=job.resume, show=True)


def rehearse(job: Job) -> None:
    """Check and print."""
    found = rehearsed(job)
    width = max(len(label) for label, _ in _rows(found))
    for label, value in _rows(found):
        typer.echo(f"{label:<{width}}  {value}")
    typer.echo("all checks passed; nothing was loaded, nothing was written")


def _of_daemon(config: RunConfig) -> str:
    """The target of the daemon that the run would use, empty where none answers."""
    from specd.client.ask import ask_status
    from specd.client.line import identity

    endpoint, auth = config.subscriber.endpoints[0], config.subscriber.auth
    try:
        report = ask_status(endpoint, 2.0, identity(auth, [endpoint]) if auth else None)
    except DaemonError:
        return ""
    return report.contract.model if report.contract else ""


def _source(name: str, config: RunConfig) -> Source:
    from specd.endpoints import resolve_endpoint
    from specd.targets.source import resolve, with_tokenizer

    endpoint = config.subscriber.endpoints[0]
    if not name:
        raise ConfigError(
            f"--dry-run has to know the target, and no daemon answers at {resolve_endpoint(endpoint)}: give "
            f"--preset NAME or --model NAME, or start the daemon"
        )
    return with_tokenizer(resolve(name, need="tokenizer"), str(config.target.get("tokenizer", "")))


def _rows(found: Rehearsal) -> Iterator[tuple[str, str]]:
    """What a person reads: label and value."""
    size = units.size
    yield "run", f"{found.method} draft for {found.target} in {found.output}"
    yield "data", f"{found.rows:,} rows, {found.samples:,} samples, {found.tokens:,} tokens, {found.labels:,} labels"
    yield (
        "steps",
        f"{found.steps:,} over {found.batches:,} batches in {found.epochs} epochs, {found.warmup:,} of warm-up",
    )
    if found.max_minutes:
        yield "", f"and {found.max_minutes:g} minutes of training at most"
    if found.done:
        yield "", f"{found.done:,} of them are done"
    yield "captured", f"layers {', '.join(map(str, found.taps))}{' and the final state' if found.final else ''}"
    yield "states", f"{size(found.batch_bytes)} a batch at most; a slot of the daemon's ring holds one"
    yield "draft", f"{found.parameters:,} trained parameters, computes in {found.dtype} on {found.device}"
    yield (
        "trainer",
        f"{size(found.trainer_bytes)} of weights, gradients and moments, and {size(found.staging_bytes)} of",
    )
    yield "", "batches under way; activations come on top"
    yield (
        "disk",
        f"{size(found.checkpoint_bytes)} a checkpoint; {found.keep} stay, and one more while it is written",
    )

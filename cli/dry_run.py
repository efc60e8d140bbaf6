"""`--dry-run` of `specd train`: the checks, the sizes and the steps of a run, without its target."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import typer
from msgspec.structs import replace

from specd import units
from specd.cli.hosting import laid_out
from specd.cli.training import Job
from specd.config.settings import RunConfig
from specd.errors import ConfigError, DaemonError

if TYPE_CHECKING:
    from specd.protocol.messages import StatusReport
    from specd.targets.source import Source
    from specd.train.rehearsal import Rehearsal

CHECKPOINTS = ("auto", "sglang", "transformers")
"""Backends whose targets are checkpoints."""
CONNECT_S = 10.0
"""How long a dry run waits for a daemon that has answered."""


def rehearsed(job: Job) -> Rehearsal:
    """Check a run. A daemon that is there, and has a session free, is asked as by the run, but for states."""
    from specd.targets.source import pick_dtype
    from specd.train.rehearsal import contract_of, rehearse

    first, served = job.first, ""
    if not job.model and (report := _asked(first)) is not None and report.contract is not None:
        if len(report.sessions) < report.max_sessions:
            return _with_daemon(job)
        served = report.contract.model
    source = _source(job.model or served or job.preset, first)
    asked = str(first.target.get("dtype", "auto"))
    dtype = str(pick_dtype(asked, source)).removeprefix("torch.")
    contract = contract_of(source.name, source.config, dtype)
    with laid_out(source) as files:
        return rehearse(job.settle, contract, source.config, files, resume=job.resume, show=True)


def rehearse(job: Job) -> None:
    """Check and print."""
    found = rehearsed(job)
    width = max(len(label) for label, _ in _rows(found))
    for label, value in _rows(found):
        typer.echo(f"{label:<{width}}  {value}")
    typer.echo("all checks passed; nothing was loaded, nothing was written")


def _asked(config: RunConfig) -> StatusReport | None:
    """What the daemon that the run would use says of itself, None where none answers."""
    from specd.client.ask import ask_status
    from specd.client.line import identity

    endpoint, auth = config.subscriber.endpoints[0], config.subscriber.auth
    try:
        return ask_status(endpoint, 2.0, identity(auth, [endpoint]) if auth else None)
    except DaemonError:
        return None


def _with_daemon(job: Job) -> Rehearsal:
    """Check a run with what its daemons say; no batch is asked for, and its share is not joined."""
    from specd.client.subscriber import Subscriber
    from specd.train.directory import target_files
    from specd.train.rehearsal import captured, rehearse

    link = job.first.subscriber
    link = replace(link, transport="auto", borrow=False, share="", connect_s=min(link.connect_s, CONNECT_S))
    with (
        Subscriber(link, partial(captured, job.settle), name="dry run") as source,
        TemporaryDirectory(prefix="specd-target-") as scratch,
    ):
        files = Path(scratch)
        config = json.loads(target_files(source.contract, source.artifact, files)["config.json"])
        found = rehearse(job.settle, source.contract, config, files, resume=job.resume, show=True)
        source.check_slots(found.longest, shared=bool(job.first.subscriber.share))
    return found


def _source(name: str, config: RunConfig) -> Source:
    from specd.endpoints import resolve_endpoint
    from specd.targets.source import resolve, with_tokenizer

    endpoint = config.subscriber.endpoints[0]
    if not name:
        raise ConfigError(
            f"--dry-run has to know the target, and no daemon serves one at {resolve_endpoint(endpoint)}: give "
            f"--preset NAME or --model NAME, or start the daemon"
        )
    try:
        source = resolve(name, need="tokenizer")
    except ConfigError:
        if config.target.get("backend", "auto") in CHECKPOINTS and name.partition(":")[0] != "synthetic":
            raise
        raise ConfigError(
            f"--dry-run of {name}: it is no checkpoint, so what it is shows only once it runs: give --endpoint of a "
            f"daemon that serves it and has a session free"
        ) from None
    return with_tokenizer(source, str(config.target.get("tokenizer", "")))


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

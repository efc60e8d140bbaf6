"""How close does a pipeline come to its bound, next to co-location and to `origin`, the protocol it replaces?

Daemons and a trainer first, each transport, lengths and depth a row, or one trainer and several over the first one;
then `origin`, whose process also times the bare target; then target and draft in one process. Each phase returns or
yields what it finds, and a `Record` keeps it.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from specd.bench.machine import machine
from specd.bench.pipeline import apart, origin_protocol, ranks, rates
from specd.bench.pipeline.memory import held, in_use
from specd.bench.pipeline.record import Record, Timeline
from specd.bench.pipeline.result import PipelineResult
from specd.bench.pipeline.rows import row_of
from specd.bench.pipeline.settings import COLOCATED_DEPTH, Lengths, Settings, batches
from specd.bench.pipeline.step import Draw, TrainingStep, make_step
from specd.client.ask import ask_status
from specd.protocol.batch import Batch
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import TargetContract


def run(
    settings: Settings,
    progress: Callable[[str], None] = lambda line: None,
    keep: Callable[[PipelineResult], None] = lambda result: None,
) -> PipelineResult:
    """Measure everything, one phase after the other; one that fails is left out, with its reason in `skipped`.

    keep: is given the result so far after each row. Raises SpecdError when daemon or trainer cannot run at all.
    """
    with _torch_set_up(settings), tempfile.TemporaryDirectory(prefix="specd-", dir="/tmp") as name:
        record = _train_here(settings, Path(name), Timeline(progress), keep)
        gc.collect()
        if settings.trainer != "cpu":
            torch.cuda.empty_cache()  # for the processes that come now
        with record.phase("co-located"):
            _train_elsewhere(settings, Path(name), record)
        return record.result()


class _Trainer(NamedTuple):
    """The trainer in this process. nonces: one for each draw of batches, so that no ring still has them."""

    contract: TargetContract
    spec: CaptureSpec
    step: TrainingStep
    draw: Draw
    nonces: Iterator[int]


def _train_here(
    settings: Settings, directory: Path, timeline: Timeline, keep: Callable[[PipelineResult], None]
) -> Record:
    """The phases whose trainer is this process; its draft is gone when this returns."""
    facts, before = machine(), in_use(settings)
    timeline("starting the daemon")
    with apart.daemons(settings, directory) as endpoints:
        trainer = _trainer(settings, endpoints, timeline)
        record = Record(settings, facts, trainer.contract, trainer.spec, timeline, keep)
        record.draft_ms = _draft_alone(settings, trainer, timeline)
        with record.phase("disaggregated"):
            _disaggregated(settings, endpoints, trainer, record, before)
            if settings.trainers > 1:
                _several(settings, endpoints, directory, record, before)
    with record.phase("origin and the bare target"):
        _origin(settings, directory, trainer, record)
    return record


def _trainer(settings: Settings, endpoints: Sequence[str], timeline: Timeline) -> _Trainer:
    """The trainer, warmed up."""
    nonces = itertools.count(1)
    with apart.subscribed(settings, endpoints, settings.transports[0], max(settings.depths)) as subscriber:
        contract = subscriber.contract

        def draw(lengths: Lengths) -> list[Batch]:
            return batches(settings, lengths, contract.vocab_size, settings.drawn, next(nonces))

        step = make_step(settings, contract, subscriber.artifact, settings.trainer)
        apart.warm_up(settings, subscriber, step, draw, timeline)
        return _Trainer(contract, subscriber.spec, step, draw, nonces)


def _draft_alone(settings: Settings, trainer: _Trainer, timeline: Timeline) -> dict[Lengths, float]:
    return apart.draft_alone(settings, trainer.spec, trainer.contract.hidden_size, trainer.step, trainer.draw, timeline)


def _disaggregated(
    settings: Settings, endpoints: Sequence[str], trainer: _Trainer, record: Record, before: dict[str, int]
) -> None:
    """Rates to a null trainer, then, of one trainer, the rows of every transport.

    before: memory in use before there was a daemon.
    """
    first, timeline = settings.transports[0], record.timeline
    with record.phase("rates to a null trainer"):
        record.fed = rates.measure(
            settings,
            lambda depth: apart.subscribed(settings, endpoints[:1], first, depth),
            trainer.contract.vocab_size,
            trainer.nonces.__next__,
            timeline,
        )
    if settings.trainers > 1:
        return
    for transport in settings.transports:
        with record.phase(f"disaggregated over {transport}"):
            for lengths, depth, clocked in apart.train(
                settings, endpoints, transport, trainer.step, trainer.draw, timeline
            ):
                if transport == first:
                    record.clocked.setdefault(lengths, []).append(clocked)
                record.add(row_of("disaggregated", lengths, depth, transport, settings.num_devices, clocked))
    theirs, own = held(settings, before, (ask_status(one, 10.0).worker_pid for one in endpoints))
    record.rows = [
        msgspec.structs.replace(row, daemon_memory_bytes=theirs, trainer_memory_bytes=own) for row in record.rows
    ]
    # Timed again: rows are held against the lower of the two.
    again = _draft_alone(settings, trainer, timeline)
    record.draft_ms = {lengths: min(ms, again[lengths]) for lengths, ms in record.draft_ms.items()}


def _several(
    settings: Settings, endpoints: tuple[str, ...], directory: Path, record: Record, before: dict[str, int]
) -> None:
    """One trainer and then all, as ranks of one training, each in a process of its own."""
    sizes = (1, settings.trainers)
    record.timeline(f"{len(endpoints)} daemons, one trainer and {settings.trainers}")
    with ranks.processes(settings, settings.trainer_devices, sizes, settings.depths, directory, endpoints) as children:
        for size in sizes:
            rows, times = ranks.timed(children, settings, size, fed=True)
            theirs, _ = held(settings, before, (ask_status(one, 10.0).worker_pid for one in endpoints))
            for row, clocked in zip(rows, times, strict=True):
                record.clocked.setdefault(row.lengths, []).append(clocked)
                record.add(msgspec.structs.replace(row, daemon_memory_bytes=theirs))


def _origin(settings: Settings, directory: Path, trainer: _Trainer, record: Record) -> None:
    record.timeline("the bare target")
    with origin_protocol.serving(settings, trainer.spec, directory) as (job, serving):
        record.bare = serving.bare
        record.keep()
        if settings.trainers > 1:
            record.skipped["origin"] = "it has one trainer"
            return
        with record.phase("origin"):
            for row in origin_protocol.rows(
                job, serving.port, trainer.contract, trainer.step, trainer.draw, record.timeline
            ):
                record.add(row)


def _train_elsewhere(settings: Settings, directory: Path, record: Record) -> None:
    """Co-location, in processes of its own."""
    if settings.tp > 1:
        record.skipped["co-located"] = "a target over several GPUs runs in processes of its own"
        return
    # A target that sleeps leaves the device to the draft: overlapping the two would show what no device can do.
    depths = (0,) if settings.model.startswith("synthetic") else (0, COLOCATED_DEPTH)
    places = [*dict.fromkeys((*settings.devices, *settings.trainer_devices))]
    if settings.trainer == "cpu":
        places = ["cpu"] * settings.num_devices
    sizes = tuple(sorted({1, settings.trainers, len(places)}))
    record.timeline(f"co-located, {' and '.join(map(str, sizes))} in parallel")
    with ranks.processes(settings, places, sizes, depths, directory) as children:
        for size in sizes:
            with record.phase("co-located" if size == 1 else f"co-located data-parallel on {size} devices"):
                for row in ranks.timed(children, settings, size, fed=False)[0]:
                    record.add(row)
    if len(places) == 1:
        record.skipped["co-located data-parallel"] = "there is one GPU: it would be the co-located row again"


@contextlib.contextmanager
def _torch_set_up(settings: Settings) -> Iterator[None]:
    """The trainer's GPU is the current one; on the CPU torch has one thread."""
    if settings.trainer != "cpu":
        torch.cuda.set_device(settings.trainer)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if settings.trainer == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)

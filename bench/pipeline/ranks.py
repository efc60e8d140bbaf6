"""Trainers in processes of their own: co-located, each with its own target, or fed by daemons; one alone, and several.

Several are ranks of one training, and meet as those of `specd train` do. This module is run as such a process: it takes
a JSON line on standard input and answers in JSON lines on standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from specd.bench.pipeline import apart
from specd.bench.pipeline.memory import memory
from specd.bench.pipeline.processes import START_S, Child, answers, as_answered, child, end_with_input
from specd.bench.pipeline.result import Mode, PipelineRow
from specd.bench.pipeline.rows import row_of
from specd.bench.pipeline.settings import Lengths, Settings, batches
from specd.bench.pipeline.step import Clocked, TrainingStep, clock, make_step
from specd.client.seats import share
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.daemon.serve import Embedded, embedded
from specd.errors import DaemonError, SpecdError
from specd.protocol.batch import Batch
from specd.train.distributed import Ranks
from specd.train.launcher import Launch
from specd.transports.registry import WITHIN_PROCESS

NONCE: Final = 2_000_000


class RanksJob(msgspec.Struct, frozen=True, kw_only=True):
    """The order of one of `world` trainers.

    depths: of the rows. sizes: how many of them train together, one after the other: always the first ones. store:
    what the paths of new files begin with where they meet. endpoints: of daemons; where there are none, each trainer
    has a target of its own.
    """

    settings: Settings
    device: str
    depths: tuple[int, ...]
    sizes: tuple[int, ...]
    rank: int = 0
    world: int = 1
    store: str = ""
    endpoints: tuple[str, ...] = ()


class RanksTimes(msgspec.Struct, frozen=True, kw_only=True):
    """The times of one row."""

    lengths: Lengths
    depth: int
    clocked: Clocked


class RanksAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a trainer measured as one of the first so many; nothing if it was not. error: why it could not."""

    timed: tuple[RanksTimes, ...] = ()
    memory_bytes: int = 0
    error: str = ""


@contextmanager
def processes(
    settings: Settings,
    places: Sequence[str],
    sizes: tuple[int, ...],
    depths: tuple[int, ...],
    directory: Path,
    endpoints: tuple[str, ...] = (),
) -> Iterator[list[Child]]:
    """A trainer on each of `places`; the rest as in RanksJob."""
    store = str(directory / ("apart" if endpoints else "together"))
    with ExitStack() as stack:
        jobs = [
            RanksJob(
                settings=settings, device=place, depths=depths, sizes=sizes, rank=rank, world=len(places), store=store,
                endpoints=endpoints,
            )
            for rank, place in enumerate(places)
        ]  # fmt: skip
        yield [stack.enter_context(child("specd.bench.pipeline.ranks", job)) for job in jobs]


def timed(
    children: Sequence[Child], settings: Settings, size: int, fed: bool
) -> tuple[list[PipelineRow], list[Clocked]]:
    """Rows, and the times behind them, of the first `size`, once those of smaller sizes have been asked for.

    fed: whether daemons have the targets. Raises DaemonError when any trainer has failed.
    """
    return collect(as_answered(children, RanksAnswer), settings, size, fed)


def collect(
    answers: Iterable[tuple[int, RanksAnswer]], settings: Settings, size: int, fed: bool
) -> tuple[list[PipelineRow], list[Clocked]]:
    """The first one's rows, as all are alike, with the memory of all. Otherwise as `timed`."""
    found: tuple[RanksTimes, ...] = ()
    used = 0
    for number, answer in answers:
        if answer.error:
            raise DaemonError(answer.error)
        found = answer.timed if number == 0 else found
        used += answer.memory_bytes
    mode: Mode = "disaggregated" if fed else "co-located" if size == 1 else "co-located data-parallel"
    devices, transport = (settings.devices_of(size), settings.transports[0]) if fed else (size, WITHIN_PROCESS)
    rows = [
        msgspec.structs.replace(
            row_of(mode, one.lengths, one.depth, transport, devices, one.clocked, size), trainer_memory_bytes=used
        )
        for one in found
    ]
    return rows, [one.clocked for one in found]


@contextmanager
def met(job: RanksJob, name: str, size: int) -> Iterator[Ranks]:
    """This trainer among the first `size`, once all of them have come here. name: of what they meet for."""
    if size == 1:
        yield Ranks()
        return
    import torch.distributed as dist

    distributed: Any = dist  # its classes are not all typed
    store = distributed.FileStore(f"{job.store}-{name}", size)
    with Ranks(Launch(job.rank, size, job.rank, size), store) as ranks:
        yield ranks


class Trainer:
    """One trainer. host: of its own target, None where daemons feed it."""

    def __init__(self, job: RanksJob, host: Embedded | None) -> None:
        self._job = job
        self._settings = settings = job.settings
        self._host = host
        self._nonces = iter(range(NONCE + job.rank * 1000, NONCE + (job.rank + 1) * 1000))
        with self._subscribed(max(job.depths), Ranks()) as subscriber:
            self._vocab = subscriber.contract.vocab_size
            self._step: TrainingStep = make_step(settings, subscriber.contract, subscriber.artifact, job.device)
            # Kernels are compiled by shape: what is timed has been run before.
            clock(subscriber.stream(chain(*map(self._draw, settings.lengths))), self._step)

    def timed(self, ranks: Ranks) -> Iterator[RanksTimes]:
        """Times of every row, as one of `ranks`."""
        settings, job = self._settings, self._job
        self._step.join(ranks)
        for lengths in settings.lengths:
            for depth in job.depths:
                with self._subscribed(depth, ranks) as subscriber:
                    apart.wait_for_all(subscriber, len(share(max(1, len(job.endpoints)), ranks.rank, ranks.size)))
                    stream = subscriber.stream(self._draw(lengths))
                    clocked = clock(stream, self._step, settings.warmup, depth > 0, subscriber.stats, settings.steps)
                yield RanksTimes(lengths=lengths, depth=depth, clocked=clocked)

    def _subscribed(self, depth: int, ranks: Ranks) -> Subscriber:
        settings, job = self._settings, self._job
        if self._host is None:
            return apart.subscribed(settings, job.endpoints, settings.transports[0], depth, job.device, ranks)
        link = SubscriberConfig(endpoints=(self._host.endpoint,), transport=WITHIN_PROCESS, depth=depth)
        return Subscriber(link, settings.capture, device=job.device, context=self._host.context)

    def _draw(self, lengths: Lengths) -> list[Batch]:
        settings = self._settings
        return batches(settings, lengths, self._vocab, settings.drawn, next(self._nonces), self._job.rank)


def run(job: RanksJob, answer: Callable[[msgspec.Struct], None]) -> None:
    """Measure once for each of the job's sizes, and answer each time."""
    settings, device = job.settings, job.device
    before = memory(device) if device != "cpu" else 0
    with ExitStack() as stack:
        if device != "cpu":
            torch.cuda.set_device(device)
        host = None
        if not job.endpoints:
            host = stack.enter_context(embedded(settings.daemon(device, max(job.depths) + 2)))
        trainer = Trainer(job, host)
        with met(job, "loaded", job.world):
            pass  # nobody compiles any more while another is timed
        for number, size in enumerate(job.sizes):
            if job.rank >= size:
                answer(RanksAnswer())
                continue
            with met(job, f"{number}-{size}", size) as ranks:
                ranks.join(device, START_S)
                found = tuple(trainer.timed(ranks))
            answer(RanksAnswer(timed=found, memory_bytes=memory(device) - before))


def main() -> None:
    """Entry of one process."""
    job = msgspec.json.decode(sys.stdin.readline(), type=RanksJob)
    end_with_input()
    if job.device == "cpu":
        torch.set_num_threads(1)
    with answers() as answer:
        try:
            run(job, answer)
        except SpecdError as error:
            answer(RanksAnswer(error=str(error)))


if __name__ == "__main__":
    main()

"""Co-location: target and draft in one process, one after the other; alone, and data-parallel in several processes.

This module is run as such a process: it takes a JSON line on standard input and answers in JSON lines on standard
output.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Final

import msgspec
import torch

from specd.bench.pipeline.memory import memory
from specd.bench.pipeline.process_group import joined
from specd.bench.pipeline.processes import START_S, Child, answers, as_answered, child, end_with_input
from specd.bench.pipeline.result import Mode, PipelineRow
from specd.bench.pipeline.rows import row_of
from specd.bench.pipeline.settings import Lengths, Settings, batches
from specd.bench.pipeline.step import Clocked, clock, make_step, synchronize
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.daemon.serve import embedded
from specd.errors import DaemonError, SpecdError
from specd.protocol.batch import Batch
from specd.transports.registry import WITHIN_PROCESS

NONCE: Final = 2_000_000


class ColocatedJob(msgspec.Struct, frozen=True, kw_only=True):
    """The order of one of `world` processes. store: path of a new file where they meet. depths: of the rows."""

    settings: Settings
    device: str
    depths: tuple[int, ...]
    rank: int = 0
    world: int = 1
    store: str = ""


class ColocatedTimes(msgspec.Struct, frozen=True, kw_only=True):
    """The times of one row. parallel: processes that trained at once."""

    lengths: Lengths
    depth: int
    parallel: int
    clocked: Clocked


class ColocatedAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a process measured; the first of several answers twice, alone and together. error: why it could not."""

    timed: tuple[ColocatedTimes, ...] = ()
    memory_bytes: int = 0
    error: str = ""


class Reduction:
    """All-reduce of gradients, overlapped with the backward pass as in data-parallel training."""

    def __init__(self, group: Any, world: int) -> None:
        self.on = False
        self._group = group
        self._world = world
        self._parameters: Sequence[torch.nn.Parameter] = ()
        self._waiting: list[tuple[torch.Tensor, Any]] = []

    def attach(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Start reducing each of these gradients as soon as it is complete."""
        self._parameters = parameters
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._send)  # type: ignore[no-untyped-call]

    def __call__(self) -> None:
        """Wait until every gradient is the mean over all processes."""
        if not self.on:
            return
        if not self._waiting:  # there was no backward pass
            for parameter in self._parameters:
                self._send(parameter)
        for gradient, work in self._waiting:
            work.wait()
            gradient.div_(self._world)
        self._waiting.clear()

    def meet(self, device: str) -> None:
        """A barrier over all processes."""
        self._group.allreduce([torch.zeros(1, device=device)]).wait()
        synchronize(device)

    def _send(self, parameter: torch.Tensor) -> None:
        if self.on and parameter.grad is not None:
            self._waiting.append((parameter.grad, self._group.allreduce([parameter.grad])))


@contextmanager
def processes(settings: Settings, depths: tuple[int, ...], directory: Path) -> Iterator[list[Child]]:
    """A process on each device of daemons and trainer; on the CPU, as many as there would be."""
    world = settings.num_devices
    places = ["cpu"] * world if settings.trainer == "cpu" else [*dict.fromkeys((*settings.devices, settings.trainer))]
    store = str(directory / "together")
    with ExitStack() as stack:
        jobs = [
            ColocatedJob(settings=settings, device=place, depths=depths, rank=rank, world=world, store=store)
            for rank, place in enumerate(places)
        ]
        yield [stack.enter_context(child("specd.bench.pipeline.colocated", job)) for job in jobs]


def alone(children: Sequence[Child]) -> list[PipelineRow]:
    """Rows of the first process, the only one that trains by then. Raises DaemonError when any has failed."""
    for number, answer in as_answered(children, ColocatedAnswer):
        rows = _rows([(number, answer)])
        if number == 0:
            return rows
    raise DaemonError("the first co-located process gave no answer")


def together(children: Sequence[Child]) -> list[PipelineRow]:
    """Rows of all processes, once `alone` has been asked for. Raises DaemonError when any has failed."""
    return _rows(as_answered(children, ColocatedAnswer))


def _rows(answers: Iterable[tuple[int, ColocatedAnswer]]) -> list[PipelineRow]:
    """The first one's rows, as all are alike, with the memory of all."""
    found: tuple[ColocatedTimes, ...] = ()
    used = 0
    for number, answer in answers:
        if answer.error:
            raise DaemonError(answer.error)
        found = answer.timed if number == 0 else found
        used += answer.memory_bytes
    rows = []
    for timed in found:
        mode: Mode = "co-located" if timed.parallel == 1 else "co-located data-parallel"
        row = row_of(mode, timed.lengths, timed.depth, WITHIN_PROCESS, timed.parallel, timed.clocked, timed.parallel)
        rows.append(msgspec.structs.replace(row, trainer_memory_bytes=used))
    return rows


def run(job: ColocatedJob, answer: Callable[[msgspec.Struct], None]) -> ColocatedAnswer:
    """Measure alone if this is the first process, then all together if there are several.

    answer: the first of several gives its times alone before all train.
    """
    settings, device = job.settings, job.device
    before = memory(device) if device != "cpu" else 0
    with ExitStack() as stack:
        if device != "cpu":
            torch.cuda.set_device(device)
        group = None
        if job.world > 1:
            backend, wait = "gloo" if device == "cpu" else "nccl", datetime.timedelta(seconds=START_S)
            group = stack.enter_context(joined(backend, job.store, job.rank, job.world, wait))
        daemon = settings.daemon(device, max(job.depths) + 2)
        host = stack.enter_context(embedded(daemon))
        reduction = Reduction(group, job.world)
        nonces = iter(range(NONCE + job.rank * 1000, NONCE + (job.rank + 1) * 1000))
        link = SubscriberConfig(endpoints=(host.endpoint,), transport=WITHIN_PROCESS, depth=max(job.depths))
        with Subscriber(link, settings.capture, device=device, context=host.context) as subscriber:
            vocab = subscriber.contract.vocab_size
            step = make_step(settings, subscriber.contract, subscriber.artifact, device, reduction)
            reduction.attach(step.parameters)

            def draw(lengths: Lengths) -> list[Batch]:
                return batches(settings, lengths, vocab, settings.warmup + settings.steps, next(nonces), job.rank)

            # Kernels are compiled by shape: what is timed has been run before.
            clock(subscriber.stream(chain(*map(draw, settings.lengths))), step)

        def timed(parallel: int) -> Iterator[ColocatedTimes]:
            for lengths in settings.lengths:
                for depth in job.depths:
                    link = SubscriberConfig(endpoints=(host.endpoint,), transport=WITHIN_PROCESS, depth=depth)
                    with Subscriber(link, settings.capture, device=device, context=host.context) as subscriber:
                        stream = subscriber.stream(draw(lengths))
                        clocked = clock(stream, step, settings.warmup, depth > 0, subscriber.stats)
                    yield ColocatedTimes(lengths=lengths, depth=depth, parallel=parallel, clocked=clocked)

        found: list[ColocatedTimes] = []
        if job.world > 1:
            reduction.meet(device)  # all have loaded and compiled
        if job.rank == 0:
            found = list(timed(1))
        if job.world > 1:
            if job.rank == 0:
                answer(ColocatedAnswer(timed=tuple(found), memory_bytes=memory(device) - before))
            reduction.meet(device)  # the others wait here for the first one
            reduction.on = True
            found = list(timed(job.world))
        used = memory(device) - before
    return ColocatedAnswer(timed=tuple(found), memory_bytes=used)


def main() -> None:
    """Entry of one process."""
    job = msgspec.json.decode(sys.stdin.readline(), type=ColocatedJob)
    end_with_input()
    if job.device == "cpu":
        torch.set_num_threads(1)
    with answers() as answer:
        try:
            answer(run(job, answer))
        except SpecdError as error:
            answer(ColocatedAnswer(error=str(error)))


if __name__ == "__main__":
    main()

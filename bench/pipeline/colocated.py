"""Target and draft in one process, one after the other; alone, and as one of several that share their gradients.

It is run as a process that takes a JSON line on standard input and answers in JSON lines on standard output.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import chain
from typing import Any

import msgspec
import torch

from specd.bench.pipeline.memory import memory
from specd.bench.pipeline.origin_protocol import joined
from specd.bench.pipeline.processes import START_S, answers, end_with_input
from specd.bench.pipeline.settings import Lengths, Settings, batches
from specd.bench.pipeline.step import Clocked, Draft, clock, make_draft, synchronize
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.daemon.serve import Embedded, embedded
from specd.drafts.dflash.objective import capture_spec
from specd.errors import SpecdError
from specd.protocol.batch import Batch
from specd.protocol.contract import TargetContract

NONCE = 2_000_000


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One of `world` processes. store: path of a new file where they meet. depths: the first one of all is alone."""

    settings: Settings
    device: str
    depths: tuple[int, ...]
    rank: int = 0
    world: int = 1
    store: str = ""


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """One measured way. parallel: processes that trained at once."""

    lengths: Lengths
    depth: int
    parallel: int
    clocked: Clocked


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What a process says at its end, and the first of several also once it has measured alone; `error` if it could
    not."""

    timed: tuple[Timed, ...] = ()
    memory_bytes: int = 0
    error: str = ""


class Reduction:
    """Sums the gradients of all processes while the backward pass still runs, as data-parallel training does it."""

    def __init__(self, group: Any, world: int) -> None:
        self.on = False
        self._group = group
        self._world = world
        self._parameters: Sequence[torch.nn.Parameter] = ()
        self._waiting: list[tuple[torch.Tensor, Any]] = []

    def attach(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Send each of these gradients off as soon as it is there."""
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
        """Wait for all other processes."""
        self._group.allreduce([torch.zeros(1, device=device)]).wait()
        synchronize(device)

    def _send(self, parameter: torch.Tensor) -> None:
        if self.on and parameter.grad is not None:
            self._waiting.append((parameter.grad, self._group.allreduce([parameter.grad])))


def run(job: Job, answer: Callable[[msgspec.Struct], None]) -> Answer:
    """Measure alone if this is the first process, then all together if there are several.

    answer: told what was measured alone before all are.
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
        link = SubscriberConfig(endpoints=(host.endpoint,), transport="inproc", depth=max(job.depths))
        with Subscriber(link, _spec(settings), device=device, context=host.context) as subscriber:
            vocab = subscriber.contract.vocab_size
            draft = make_draft(settings, subscriber.contract, subscriber.artifact, device, reduction)
            reduction.attach(draft.parameters)

            def draw(lengths: Lengths) -> list[Batch]:
                return batches(settings, lengths, vocab, settings.warmup + settings.steps, next(nonces), job.rank)

            # Kernels are compiled by shape: what is timed has been run before.
            clock(subscriber.stream(chain(*map(draw, settings.lengths))), draft)

        def one(lengths: Lengths, depth: int, parallel: int) -> Timed:
            clocked = _clocked(settings, host, device, depth, draw(lengths), draft)
            return Timed(lengths=lengths, depth=depth, parallel=parallel, clocked=clocked)

        timed: list[Timed] = []
        if job.world > 1:
            reduction.meet(device)  # nobody loads or compiles any more
        if job.rank == 0:
            timed = [one(lengths, depth, 1) for lengths in settings.lengths for depth in job.depths]
        if job.world > 1:
            if job.rank == 0:
                answer(Answer(timed=tuple(timed), memory_bytes=memory(device) - before))
            reduction.meet(device)  # the others wait here for the first one
            reduction.on = True
            timed = [one(lengths, depth, job.world) for lengths in settings.lengths for depth in job.depths]
        used = memory(device) - before
    return Answer(timed=tuple(timed), memory_bytes=used)


def _clocked(settings: Settings, host: Embedded, device: str, depth: int, drawn: list[Batch], draft: Draft) -> Clocked:
    link = SubscriberConfig(endpoints=(host.endpoint,), transport="inproc", depth=depth)
    with Subscriber(link, _spec(settings), device=device, context=host.context) as subscriber:
        return clock(subscriber.stream(drawn), draft, settings.warmup, depth > 0, subscriber.stats)


def _spec(settings: Settings) -> Any:
    def spec(contract: TargetContract) -> Any:
        return capture_spec(settings.dflash, contract)

    return spec


def main() -> None:
    """Entry of one process."""
    job = msgspec.json.decode(sys.stdin.readline(), type=Job)
    end_with_input()
    if job.device == "cpu":
        torch.set_num_threads(1)
    with answers() as answer:
        try:
            answer(run(job, answer))
        except SpecdError as error:
            answer(Answer(error=str(error)))


if __name__ == "__main__":
    main()

"""How close does a pipeline come to its bound, and what do co-location and the seed's protocol make of the same?"""

from __future__ import annotations

import contextlib
import gc
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import torch

from specd.bench.machine import machine
from specd.bench.pipeline import colocated, rates
from specd.bench.pipeline import origin_protocol as seed
from specd.bench.pipeline.bare_target import Bare
from specd.bench.pipeline.memory import held, in_use
from specd.bench.pipeline.processes import as_answered, child, daemon
from specd.bench.pipeline.result import Result, Row
from specd.bench.pipeline.rows import row_of, settle
from specd.bench.pipeline.settings import Lengths, Settings, batches
from specd.bench.pipeline.step import Clocked, Draft, clock, given, made_up, make_draft, synchronize
from specd.client.ask import ask_status
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.drafts.dflash.objective import capture_spec
from specd.errors import DaemonError
from specd.plan import Work
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import TargetContract

log = logging.getLogger(__name__)

CONNECT_S = 60.0
"""Longest wait for a daemon, and for one of its batches."""


def run(
    settings: Settings,
    progress: Callable[[str], None] = lambda line: None,
    keep: Callable[[Result], None] = lambda result: None,
) -> Result:
    """Measure everything, one phase after the other; one that fails is left out, with its reason in `skipped`.

    keep: told all there is so far, again and again. Raises SpecdError when daemon or trainer cannot run at all.
    """
    return _Bench(settings, progress, keep).run()


class _Bench:
    """One run: what it knows so far."""

    def __init__(self, settings: Settings, progress: Callable[[str], None], keep: Callable[[Result], None]) -> None:
        self._settings = settings
        self._show = progress
        self._keep = keep
        self._begin = time.perf_counter()
        self._machine = machine()
        self._rows: list[Row] = []
        self._fed: dict[str, rates.Fed] = {}
        self._skipped: dict[str, str] = {}
        self._began: dict[str, float] = {}
        self._nonces = count(1)
        self._draft: Draft | None = None
        self._draft_ms: dict[str, float] = {}
        self._bare: Bare | None = None
        self._apart: dict[str, list[Clocked]] = {}
        self._contract: TargetContract | None = None
        self._spec: CaptureSpec | None = None

    def run(self) -> Result:
        settings = self._settings
        if settings.trainer != "cpu":
            torch.cuda.set_device(settings.trainer)
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if settings.trainer == "cpu" else threads)
        try:
            with tempfile.TemporaryDirectory(prefix="specd-", dir="/tmp") as directory:
                with self._phase("disaggregated"):
                    self._disaggregated(Path(directory))
                with self._phase("the seed's protocol and the bare target"):
                    self._seeded(Path(directory))
                self._draft = None
                gc.collect()
                if settings.trainer != "cpu":
                    torch.cuda.empty_cache()  # for the processes that come now
                with self._phase("co-located"):
                    self._colocated(Path(directory))
        finally:
            torch.set_num_threads(threads)
        return self._result()

    @contextlib.contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """What fails in here is left out, unless nothing at all was measured before."""
        try:
            yield
        except Exception as error:
            if not self._draft_ms:
                raise
            log.debug("%s failed", name, exc_info=True)
            self._skipped[name] = str(error) or repr(error)
        self._keep(self._result())

    def _result(self) -> Result:
        assert self._contract is not None
        return Result(
            machine=self._machine,
            settings=msgspec.to_builtins(self._settings),
            target={
                "model": self._contract.model,
                "layers": self._contract.num_layers,
                "hidden_size": self._contract.hidden_size,
                "vocabulary": self._contract.vocab_size,
                "dtype": self._contract.dtype,
            },
            wall_s=round(time.perf_counter() - self._begin, 1),
            target_ms=self._bare.batch_ms if self._bare else {},
            target_spread_ms=self._bare.batch_spread_ms if self._bare else {},
            draft_ms=self._draft_ms,
            rows=settle(self._rows, self._settings, self._bare, self._draft_ms),
            rates=tuple(rates.compare(self._settings, self._fed, self._bare)) if self._bare and self._fed else (),
            work=self._work(),
            skipped=self._skipped,
            began_s=self._began,
        )

    def _progress(self, line: str) -> None:
        self._began[line] = round(time.perf_counter() - self._begin, 1)
        self._show(line)

    # Daemon and trainer apart

    def _disaggregated(self, directory: Path) -> None:
        settings, device = self._settings, self._settings.trainer
        before = in_use(settings)
        with ExitStack() as stack:
            self._progress("starting the daemon")
            endpoints = tuple(
                stack.enter_context(daemon(settings.daemon(place, settings.slots), directory / f"{index}.sock"))
                for index, place in enumerate(settings.devices)
            )
            with self._subscriber(endpoints, settings.transports[0], max(settings.depths)) as subscriber:
                contract, spec = self._contract, self._spec = subscriber.contract, subscriber.spec
                self._draft = make_draft(settings, contract, subscriber.artifact, device)
                self._warm(subscriber, contract, spec)
            self._clock_draft(contract, spec)
            with self._phase("rates to a null trainer"):
                self._fed = rates.measure(
                    settings,
                    lambda depth: self._subscriber(endpoints[:1], settings.transports[0], depth),
                    contract.vocab_size,
                    lambda: next(self._nonces),
                    self._progress,
                )
            first = len(self._rows)
            for transport in settings.transports:
                with self._phase(f"disaggregated over {transport}"):
                    # The others show what the way makes of it; what lengths do is the same over all of them.
                    whole = transport == settings.transports[0]
                    for lengths in settings.lengths if whole else settings.lengths[:1]:
                        for depth in settings.depths if whole else sorted({min(settings.depths), max(settings.depths)}):
                            self._row(endpoints, transport, lengths, depth)
            theirs, own = held(settings, before, (ask_status(one, 10.0).worker_pid for one in endpoints))
            self._rows[first:] = [
                msgspec.structs.replace(row, daemon_memory_bytes=theirs, trainer_memory_bytes=own)
                for row in self._rows[first:]
            ]
            self._clock_draft(contract, spec)  # again: the lower bound is the one to be measured by

    def _warm(self, subscriber: Subscriber, contract: TargetContract, spec: CaptureSpec) -> None:
        """Kernels of target and draft are compiled by shape: what is timed has been run before."""
        taps = made_up(self._settings, spec, contract.hidden_size)
        for lengths in self._settings.lengths:
            self._progress(f"warming up, {lengths} lengths")
            clock(subscriber.stream(self._batches(lengths, contract.vocab_size)), None)
            clock(given(self._batches(lengths, contract.vocab_size), taps), self._draft)

    def _clock_draft(self, contract: TargetContract, spec: CaptureSpec) -> None:
        """Time the optimizer step on states that are there."""
        settings = self._settings
        taps = made_up(settings, spec, contract.hidden_size)
        for lengths in settings.lengths:
            self._progress(f"the draft alone, {lengths} lengths")
            drawn = self._batches(lengths, contract.vocab_size)
            clocked = clock(given(drawn, taps), self._draft, settings.warmup)
            found = round(clocked.mean_s * 1e3, 3)
            self._draft_ms[lengths] = min(found, self._draft_ms.get(lengths, found))

    def _row(self, endpoints: tuple[str, ...], transport: str, lengths: Lengths, depth: int) -> None:
        settings = self._settings
        self._progress(f"{transport}, {lengths} lengths, depth {depth}")
        with self._subscriber(endpoints, transport, depth) as subscriber:
            drawn = self._batches(lengths, subscriber.contract.vocab_size)
            _wait_for_all(subscriber, len(endpoints))
            clocked = clock(subscriber.stream(drawn), self._draft, settings.warmup, depth > 0, subscriber.stats)
        if transport == settings.transports[0]:
            self._apart.setdefault(lengths, []).append(clocked)
        self._rows.append(row_of("disaggregated", lengths, depth, transport, settings.num_devices, clocked))
        self._keep(self._result())

    def _subscriber(self, endpoints: tuple[str, ...], transport: str, depth: int) -> Subscriber:
        settings = self._settings
        link = SubscriberConfig(
            endpoints=endpoints, transport=transport, depth=depth, connect_s=CONNECT_S, timeout_s=CONNECT_S
        )
        return Subscriber(
            link, lambda contract: capture_spec(settings.dflash, contract), device=settings.trainer, name="bench"
        )

    def _batches(self, lengths: Lengths, vocab: int) -> list[Any]:
        settings = self._settings
        return list(batches(settings, lengths, vocab, settings.warmup + settings.steps, next(self._nonces)))

    # The seed's protocol, and the bare target

    def _seeded(self, directory: Path) -> None:
        settings = self._settings
        assert self._contract is not None
        assert self._spec is not None
        backend = "gloo" if settings.shared or settings.trainer == "cpu" else "nccl"
        store = directory / "seed"
        self._progress("the bare target")
        job = seed.Job(settings=settings, spec=self._spec, store=str(store), backend=backend)
        with child("specd.bench.pipeline.origin_protocol", job) as server:
            serving = server.answer(seed.Serving)
            if serving.error:
                raise DaemonError(serving.error)
            self._bare = serving.bare
            self._keep(self._result())
            with self._phase("the seed's protocol"), seed.joined(backend, str(store), seed.TRAINER, 2) as group:
                seed.shake_hands(group, seed.TRAINER, "cpu" if backend == "gloo" else settings.trainer)
                client = seed.Client(serving.port, group, backend, self._spec, self._contract, settings.trainer)
                with contextlib.closing(client):
                    for lengths in settings.lengths:
                        for depth in (0, 1):
                            self._progress(f"the seed's protocol, {lengths} lengths, depth {depth}")
                            drawn = self._batches(lengths, self._contract.vocab_size)
                            stream = client.stream(drawn, overlap=depth > 0)
                            clocked = clock(stream, self._draft, settings.warmup, depth > 0)
                            self._rows.append(self._seed_row(lengths, depth, backend, clocked))
                            self._keep(self._result())
            synchronize(settings.trainer)

    def _seed_row(self, lengths: Lengths, depth: int, backend: str, clocked: Clocked) -> Row:
        assert self._contract is not None
        assert self._spec is not None
        nbytes = seed.payload_bytes(self._spec, self._contract.hidden_size) * clocked.tokens
        devices = self._settings.tp + (not self._settings.shared)
        row = row_of("seed protocol", lengths, depth, backend, devices, clocked)
        return msgspec.structs.replace(row, bytes_per_sample=nbytes / clocked.samples)

    # Target and draft together

    def _colocated(self, directory: Path) -> None:
        settings = self._settings
        if settings.tp > 1:
            self._skipped["co-located"] = "a target over several GPUs runs in processes of its own"
            return
        world = settings.num_devices
        # A target that sleeps leaves the device to the draft: overlapping the two would show what no device can do.
        depths = (0,) if settings.model.startswith("synthetic") else (0, 2)
        places = (
            ["cpu"] * world if settings.trainer == "cpu" else [*dict.fromkeys((*settings.devices, settings.trainer))]
        )
        self._progress(f"co-located, alone and {world} in parallel")
        with ExitStack() as stack:
            store = str(directory / "together")
            jobs = [
                colocated.Job(settings=settings, device=place, depths=depths, rank=rank, world=world, store=store)
                for rank, place in enumerate(places)
            ]
            children = [stack.enter_context(child("specd.bench.pipeline.colocated", job)) for job in jobs]
            if world == 1:
                self._together([(0, children[0].answer(colocated.Answer))])
                self._skipped["co-located data-parallel"] = "there is one GPU: it would be the co-located row again"
                return
            # The first one answers twice. All others answer once, at the end, unless they fail.
            for number, answer in as_answered(children, colocated.Answer):
                self._together([(number, answer)])
                if number == 0:
                    break
            with self._phase("co-located data-parallel"):
                self._together(as_answered(children, colocated.Answer))

    def _together(self, answers: Iterable[tuple[int, colocated.Answer]]) -> None:
        """The rows of processes that trained together: the first one's, as all are alike, with the memory of all.

        Raises DaemonError when one failed.
        """
        found: tuple[colocated.Timed, ...] = ()
        used = 0
        for number, answer in answers:
            if answer.error:
                raise DaemonError(answer.error)
            found = answer.timed if number == 0 else found
            used += answer.memory_bytes
        for timed in found:
            mode: Any = "co-located" if timed.parallel == 1 else "co-located data-parallel"
            row = row_of(mode, timed.lengths, timed.depth, "inproc", timed.parallel, timed.clocked, timed.parallel)
            self._rows.append(msgspec.structs.replace(row, trainer_memory_bytes=used))
        self._keep(self._result())

    # What follows from all phases

    def _work(self) -> Work | None:
        """The rates of this run, as a plan takes them; of the first lengths. None while they are not all there."""
        settings = self._settings
        assert self._contract is not None
        assert self._spec is not None
        lengths = settings.lengths[0]
        apart = [clocked for found in self._apart.values() for clocked in found]
        if lengths not in self._apart or not (self._bare or self._fed):
            return None
        first = self._apart[lengths][0]
        tokens = first.tokens / len(first.seconds)
        fetch_s = sum(clocked.stats.fetch_s for clocked in apart)
        if self._bare is not None:
            times = self._bare.batch_ms[lengths]
            alone = tokens / times[1] * 1e3
            merged = max(alone, tokens / min(times.values()) * 1e3)
        else:
            merged, alone = self._fed["long"].tokens_per_s, 0.0
        return Work(
            target_tokens_per_s=merged,
            draft_tokens_per_s=tokens / self._draft_ms[lengths] * 1e3,
            colocated_target_tokens_per_s=alone,
            batch_tokens=tokens,
            tokens_per_sample=first.tokens / first.samples,
            bytes_per_token=self._spec.bytes_per_token(self._contract.hidden_size),
            gpus_per_daemon=settings.tp,
            wire_gb_per_s=sum(clocked.stats.nbytes for clocked in apart) / fetch_s / 1e9 if fetch_s else 0.0,
        )


def _wait_for_all(subscriber: Subscriber, daemons: int) -> None:
    """Wait until every daemon is reached: the first one alone would be given all batches of a deep row."""
    limit = time.monotonic() + CONNECT_S
    while len(subscriber.stats().transports) < daemons:
        if time.monotonic() > limit:
            raise DaemonError(f"only {len(subscriber.stats().transports)} of {daemons} daemons were reached")
        time.sleep(0.01)  # before anything is timed; a subscriber tells nobody of its second daemon

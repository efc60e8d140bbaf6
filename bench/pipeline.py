"""How close does a pipeline come to its bound, and what do co-location and the seed's protocol make of the same?"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import torch

from specd.balance import Work
from specd.bench import pipeline_colocated as colocated
from specd.bench import seed
from specd.bench.machine import machine
from specd.bench.pipeline_bare import Bare
from specd.bench.pipeline_draft import Clocked, Draft, clock, given, make_draft, memory, synchronize
from specd.bench.pipeline_processes import child, daemon
from specd.bench.pipeline_result import Rate, Result, Row
from specd.bench.pipeline_work import Lengths, Settings, batches, short_batches
from specd.capture import CaptureSpec
from specd.client import Subscriber
from specd.config import SubscriberConfig
from specd.errors import DaemonError
from specd.metrics import Stats
from specd.protocol import TargetContract
from specd.session import ask_status
from specd.train.dflash import capture_spec

CONNECT_S = 60.0
RING_BAR, MERGING_BAR = 0.95, 0.8
BURSTS = 8
"""Forwards of merged samples that the merging row times."""


def run(settings: Settings, progress: Callable[[str], None] = lambda line: None) -> Result:
    """Measure everything, one phase after the other. Raises SpecdError when daemon or trainer cannot run at all."""
    return _Bench(settings, progress).run()


class _Bench:
    """One run: what it knows so far."""

    def __init__(self, settings: Settings, progress: Callable[[str], None]) -> None:
        self._settings = settings
        self._progress = progress
        self._rows: list[Row] = []
        self._rates: dict[str, tuple[str, int, float]] = {}
        self._skipped: dict[str, str] = {}
        self._nonces = count(1)
        self._draft_ms: dict[str, float] = {}
        self._bare: Bare | None = None
        self._wire = [0, 0.0]
        self._contract: TargetContract | None = None
        self._spec: CaptureSpec | None = None

    def run(self) -> Result:
        settings, begin = self._settings, time.perf_counter()
        if settings.trainer != "cpu":
            torch.cuda.set_device(settings.trainer)
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if settings.trainer == "cpu" else threads)
        try:
            with tempfile.TemporaryDirectory(prefix="specd-", dir="/tmp") as directory:
                draft = self._disaggregated(Path(directory))
                self._seeded(Path(directory), draft)
                del draft
                if settings.trainer != "cpu":
                    torch.cuda.empty_cache()  # for the processes that come now
                self._colocated(Path(directory))
        finally:
            torch.set_num_threads(threads)
        assert self._contract is not None
        return Result(
            machine=machine(),
            settings=msgspec.to_builtins(settings),
            target={
                "model": self._contract.model,
                "layers": self._contract.num_layers,
                "hidden_size": self._contract.hidden_size,
                "vocabulary": self._contract.vocab_size,
                "dtype": self._contract.dtype,
            },
            wall_s=round(time.perf_counter() - begin, 1),
            target_ms=self._bare.batch_ms if self._bare else {},
            draft_ms=self._draft_ms,
            rows=tuple(self._settle(row) for row in self._rows),
            rates=tuple(self._compare()),
            work=self._work(),
            skipped=self._skipped,
        )

    # Daemon and trainer apart

    def _disaggregated(self, directory: Path) -> Draft:
        settings, device = self._settings, self._settings.trainer
        before = memory(settings.devices[0]) if device != "cpu" else 0
        with ExitStack() as stack:
            self._progress("starting the daemon")
            endpoints = tuple(
                stack.enter_context(daemon(settings.daemon(place, settings.slots), directory / f"{index}.sock"))
                for index, place in enumerate(settings.devices)
            )
            with self._subscriber(endpoints, settings.transports[0], 0) as subscriber:
                contract, spec = self._contract, self._spec = subscriber.contract, subscriber.spec
                draft = make_draft(settings, contract, subscriber.artifact, device)
            self._clock_draft(draft, contract, spec)
            self._null_rates(endpoints[:1], contract.vocab_size)
            first = len(self._rows)
            for transport in settings.transports:
                for lengths in settings.lengths:
                    for depth in settings.depths:
                        self._row(endpoints, transport, lengths, depth, draft)
            self._clock_draft(draft, contract, spec)  # again: the lower bound is the one to be measured by
            if device == "cpu":
                pid = ask_status(endpoints[0], 10.0).worker_pid
                held = memory("cpu", pid)
            else:
                own = torch.cuda.memory_reserved(device) if settings.shared else 0
                held = memory(settings.devices[0]) - before - own
            self._rows[first:] = [msgspec.structs.replace(row, daemon_memory_bytes=held) for row in self._rows[first:]]
        return draft

    def _clock_draft(self, draft: Draft, contract: TargetContract, spec: CaptureSpec) -> None:
        """Time the optimizer step on states that are there; what they are makes no difference to the time."""
        settings = self._settings
        shape = (settings.batch_tokens, len(spec.taps), contract.hidden_size)
        taps = torch.randn(shape, dtype=getattr(torch, spec.dtype), device=settings.trainer)
        for lengths in settings.lengths:
            self._progress(f"the draft alone, {lengths} lengths")
            drawn = self._batches(lengths, contract.vocab_size)
            clocked = clock(given(drawn, taps), draft, settings.warmup, lambda: None)
            found = round(clocked.mean_s * 1e3, 3)
            self._draft_ms[lengths] = min(found, self._draft_ms.get(lengths, found))

    def _null_rates(self, endpoints: tuple[str, ...], vocab: int) -> None:
        """Tokens a second from one daemon to a trainer that does nothing with them."""
        settings = self._settings
        transport, timed = settings.transports[0], settings.warmup + settings.steps
        whole = msgspec.structs.replace(settings, sample_tokens=settings.batch_tokens)
        singles = settings.many * (BURSTS + 2)
        plans = (
            ("short", f"{settings.many}×{settings.short}", 2, settings.warmup,
             short_batches(settings, vocab, settings.many, timed, next(self._nonces))),
            ("long", f"1×{settings.batch_tokens}", 1, settings.warmup,
             batches(whole, "fixed", vocab, timed, next(self._nonces))),
            ("singles", f"1×{settings.short}", settings.merge_depth, 2 * settings.many,
             short_batches(settings, vocab, 1, singles, next(self._nonces))),
        )  # fmt: skip
        for name, composition, depth, warmup, drawn in plans:
            self._progress(f"{composition} to a null trainer at depth {depth}")
            with self._subscriber(endpoints, transport, depth) as subscriber:
                clocked = clock(subscriber.stream(drawn), None, warmup, lambda: None)
            self._rates[name] = (composition, depth, clocked.tokens / sum(clocked.seconds))

    def _row(self, endpoints: tuple[str, ...], transport: str, lengths: Lengths, depth: int, draft: Draft) -> None:
        settings, device = self._settings, self._settings.trainer
        self._progress(f"{transport}, {lengths} lengths, depth {depth}")
        if device != "cpu":
            torch.cuda.reset_peak_memory_stats(device)
        with self._subscriber(endpoints, transport, depth) as subscriber:
            drawn = self._batches(lengths, subscriber.contract.vocab_size)
            _wait_for_all(subscriber, len(endpoints))
            marks = [subscriber.stats()]
            stream = subscriber.stream(drawn)
            clocked = clock(stream, draft, settings.warmup, lambda: marks.append(subscriber.stats()))
            stats = subscriber.stats().difference(marks[-1])
        self._wire[0] += stats.nbytes
        self._wire[1] += stats.fetch_s
        used = memory("cpu") if device == "cpu" else int(torch.cuda.max_memory_allocated(device))
        row = _row("disaggregated", lengths, depth, transport, settings.num_devices, clocked, stats)
        self._rows.append(msgspec.structs.replace(row, trainer_memory_bytes=used))

    def _subscriber(self, endpoints: tuple[str, ...], transport: str, depth: int) -> Subscriber:
        settings = self._settings
        link = SubscriberConfig(endpoints=endpoints, transport=transport, depth=depth)
        return Subscriber(
            link, lambda contract: capture_spec(settings.dflash, contract), device=settings.trainer, name="bench"
        )

    def _batches(self, lengths: Lengths, vocab: int) -> list[Any]:
        settings = self._settings
        return list(batches(settings, lengths, vocab, settings.warmup + settings.steps, next(self._nonces)))

    # The seed's protocol, and the bare target

    def _seeded(self, directory: Path, draft: Draft) -> None:
        settings = self._settings
        assert self._contract is not None
        assert self._spec is not None
        backend = "gloo" if settings.shared or settings.trainer == "cpu" else "nccl"
        store = directory / "seed"
        self._progress("the bare target")
        job = seed.Job(settings=settings, spec=self._spec, store=str(store), backend=backend)
        with child("specd.bench.seed", job) as server:
            serving = server.answer(seed.Serving)
            if serving.error:
                self._skipped["the seed's protocol and the bare target"] = serving.error
                return
            self._bare = serving.bare
            with seed.joined(backend, str(store), seed.TRAINER, 2) as group:
                client = seed.Client(serving.port, group, backend, self._spec, self._contract, settings.trainer)
                with contextlib.closing(client):
                    for lengths in settings.lengths:
                        for depth in (0, 1):
                            self._progress(f"the seed's protocol, {lengths} lengths, depth {depth}")
                            drawn = self._batches(lengths, self._contract.vocab_size)
                            stream = client.stream(drawn, overlap=depth > 0)
                            clocked = clock(stream, draft, settings.warmup, lambda: None)
                            self._rows.append(self._seed_row(lengths, depth, backend, clocked))
            synchronize(settings.trainer)

    def _seed_row(self, lengths: str, depth: int, backend: str, clocked: Clocked) -> Row:
        assert self._contract is not None
        assert self._spec is not None
        nbytes = seed.payload_bytes(self._spec, self._contract.hidden_size) * clocked.tokens
        devices = self._settings.tp + (not self._settings.shared)
        row = _row("seed protocol", lengths, depth, backend, devices, clocked)
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
            children = [stack.enter_context(child("specd.bench.pipeline_colocated", job)) for job in jobs]
            try:
                answers = [process.answer(colocated.Answer) for process in children]
            except DaemonError as error:
                self._skipped["co-located"] = str(error)
                return
        if problem := next((answer.error for answer in answers if answer.error), ""):
            self._skipped["co-located"] = problem
            return
        for timed in answers[0].timed:
            mode: Any = "co-located" if timed.parallel == 1 else "co-located data-parallel"
            row = _row(
                mode, timed.lengths, timed.depth, "inproc", timed.parallel, timed.clocked, timed.stats, timed.parallel
            )
            self._rows.append(msgspec.structs.replace(row, trainer_memory_bytes=answers[0].memory_bytes))
        if world == 1:
            self._skipped["co-located data-parallel"] = "there is one GPU: it would be the co-located row again"

    # What follows from all phases

    def _settle(self, row: Row) -> Row:
        """A row with what needs other rows: its bound, and the seed's protocol beside it."""
        rivals = [other for other in self._rows if other.mode == "seed protocol" and other.lengths == row.lengths]
        if row.mode == "disaggregated" and row.depth == 0:  # asked on demand, as the seed's without overlap
            rivals = [other for other in rivals if other.depth == 0]
        changes: dict[str, Any] = {}
        if rivals and row.mode != "seed protocol":
            changes["over_seed"] = round(row.samples_per_s / max(other.samples_per_s for other in rivals), 3)
        if row.mode == "disaggregated" and self._bare is not None:
            merged = self._settings.merged(row.depth)
            times = self._bare.batch_ms[row.lengths]
            target = min(ms for size, ms in times.items() if size <= merged)
            draft = self._draft_ms[row.lengths]
            # On one device there is nothing to overlap with, and waiting costs it nothing.
            bound = target + draft if self._settings.shared else max(target / len(self._settings.devices), draft)
            changes |= {"bound_ms": round(bound, 3), "efficiency": round(bound / row.iteration_ms, 4)}
        return msgspec.structs.replace(row, **changes)

    def _compare(self) -> Iterator[Rate]:
        if self._bare is None:
            return
        short = self._rates["short"][2]
        for name, key, reference, rate, bar in (
            ("the ring", "short", "bare target", self._bare.short_tokens_per_s, RING_BAR),
            ("the ring", "long", "bare target", self._bare.long_tokens_per_s, RING_BAR),
            ("one by one", "singles", f"{self._rates['short'][0]}, the ring", short, MERGING_BAR),
        ):
            if key == "singles" and self._settings.target.get("exact"):
                continue  # a target that runs every batch alone merges nothing
            composition, depth, found = self._rates[key]
            yield Rate(
                name=name,
                composition=composition,
                depth=depth,
                tokens_per_s=round(found, 1),
                reference=reference,
                reference_tokens_per_s=round(rate, 1),
                ratio=round(found / rate, 4),
                bar=bar,
            )

    def _work(self) -> Work:
        """The rates of this run, as a plan takes them; of the first lengths."""
        settings = self._settings
        assert self._contract is not None
        assert self._spec is not None
        lengths = settings.lengths[0]
        row = next(row for row in self._rows if row.lengths == lengths and row.mode == "disaggregated")
        tokens, samples = row.tokens_per_s * row.iteration_ms / 1e3, row.samples_per_s * row.iteration_ms / 1e3
        if self._bare is not None:
            times = self._bare.batch_ms[lengths]
            alone = tokens / times[1] * 1e3
            merged = max(alone, tokens / min(times.values()) * 1e3)
        else:
            merged, alone = self._rates["long"][2], 0.0
        return Work(
            target_tokens_per_s=merged,
            draft_tokens_per_s=tokens / self._draft_ms[lengths] * 1e3,
            colocated_target_tokens_per_s=alone,
            batch_tokens=tokens,
            tokens_per_sample=tokens / samples,
            bytes_per_token=self._spec.bytes_per_token(self._contract.hidden_size),
            gpus_per_daemon=settings.tp,
            wire_gb_per_s=self._wire[0] / self._wire[1] / 1e9 if self._wire[1] else 0.0,
        )


def _wait_for_all(subscriber: Subscriber, daemons: int) -> None:
    """Wait until every daemon is reached: the first one alone would be given all batches of a deep row."""
    limit = time.monotonic() + CONNECT_S
    while len(subscriber.stats().transports) < daemons:
        if time.monotonic() > limit:
            raise DaemonError(f"only {len(subscriber.stats().transports)} of {daemons} daemons were reached")
        time.sleep(0.01)  # before anything is timed; a subscriber tells nobody of its second daemon


def _row(
    mode: Any,
    lengths: str,
    depth: int,
    transport: str,
    devices: int,
    clocked: Clocked,
    stats: Stats | None = None,
    parallel: int = 1,
) -> Row:
    """A row of what was timed. stats: of the same time; without any there are no waits to report."""
    figures = clocked.figures(parallel)
    waits: dict[str, Any] = {}
    if stats is not None and stats.batches:
        iterations = len(clocked.seconds)
        target, wire = (waited / iterations * 1e3 for waited in (stats.target_wait_s, stats.wire_wait_s))
        waits = {
            "target_wait_ms": round(target, 3),
            "wire_wait_ms": round(wire, 3),
            "trainer_ms": round(max(0.0, figures["iteration_ms"] - target - wire), 3),
            "forward_ms": round(stats.forward_s / iterations * 1e3, 3),
        }
    return Row(
        mode=mode,
        lengths=lengths,
        depth=depth,
        transport=transport,
        devices=devices,
        gpu_seconds_per_sample=round(devices / figures["samples_per_s"], 6),
        bytes_per_sample=stats.nbytes / clocked.samples if stats is not None else 0.0,
        **figures,
        **waits,
    )

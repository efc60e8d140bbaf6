"""What does each transport give on this machine, next to a raw copy of the same size, and which one would auto take?

A child process serves, this one fetches; `inproc` has both here. Each row alternates the transport's transfers with
raw copies of the same kind (`specd.bench.transport.raw`), first one at a time, then back to back.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Final, Literal

from specd import units
from specd.bench.machine import machine
from specd.bench.transport import lanes, load, timing
from specd.bench.transport.lanes import MIB, Lane, Patterns, Placement, Served
from specd.bench.transport.raw import Shelf
from specd.bench.transport.result import Auto, Result, Row, Slowdown
from specd.client.handshake import LEAST_TIMED_BYTES, PROBE_BYTES, TIMED_BYTES, TIMED_TRIES
from specd.errors import TransportError
from specd.protocol.batch import slot_bytes
from specd.protocol.capture import CaptureSpec
from specd.transports.base import Traits
from specd.transports.registry import DEVICE_ORDER, HOST_ORDER, choose, names
from specd.transports.registry import load as load_transport
from specd.worker.ring_memory import RDMA_DEVICES, candidates

SIZES: Final = (4096, 64 << 10, MIB, 16 * MIB, 64 * MIB, 256 * MIB)
LARGEST: Final = 1 << 30
"""The sweep ends here where a GPU takes part, at 256 MiB where none does."""
_DFLASH: Final = CaptureSpec(taps=(1, 12, 23, 34, 45))
_EAGLE3: Final = CaptureSpec(taps=(1, 23, 44), final=True)
SHAPES: Final = {
    "EAGLE-3, 3,072 tokens": slot_bytes(_EAGLE3, 2048, 3072),
    "DFlash-5, 3,072 tokens": slot_bytes(_DFLASH, 2048, 3072),
    "DFlash-5, 12,288 tokens": slot_bytes(_DFLASH, 2048, 12288),
}
"""Real batches of a target with 48 layers of 2,048, bfloat16: five taps; three taps and the final state."""
LOAD_BYTES: Final = 256 * MIB
"""The size that is streamed beside a matmul."""
BUDGET_S: Final = 150.0
"""How long a run may take in all, unless told otherwise; the starts of the hosts are part of it."""
LATENCY_SHARE: Final = 0.5


def run(
    transports: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    iterations: int = 0,
    devices: str = "all",
    budget_s: float = BUDGET_S,
    progress: Callable[[str], None] = lambda what: None,
) -> Result:
    """Measure everything that can be measured here, within `budget_s` seconds or a little more.

    transports: names, all when empty. sizes: bytes, the default sweep and the real batches when empty. iterations:
    timed transfers a row, 0 for as many as the budget allows (5 to 500). devices: see `lanes.placements`. progress: is
    told what is being measured. What cannot be measured is listed under `skipped`; see also `complain`. Raises
    TransportError for a name that no transport has.
    """
    import torch

    for name in transports or ():
        load_transport(name)
    budget = timing.Budget(budget_s)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = lanes.placements(devices, torch.cuda.device_count())
        bench = _Bench(found, transports or (), sizes or (), iterations, budget, progress)
        bench.measure()
    finally:
        torch.set_num_threads(threads)
    return Result(
        machine=machine(),
        budget_s=budget_s,
        wall_s=round(budget.spent, 1),
        auto=tuple(bench.auto),
        rows=tuple(bench.rows),
        slowdowns=tuple(bench.slowdowns),
        skipped=bench.skipped,
    )


def complain(result: Result, transports: Sequence[str]) -> None:
    """Raise TransportError when one of the transports, which somebody named, has no row in the result."""
    for name in transports:
        if not any(row.transport == name for row in result.rows):
            ours = f": {name}"
            reasons = [reason for title, reason in result.skipped.items() if title.split(",")[0].endswith(ours)]
            raise TransportError(f"{name} cannot be measured: {'; '.join(dict.fromkeys(reasons)) or 'no lane has it'}")


class _Bench:
    """One run: its hosts, started side by side, and what was found so far."""

    def __init__(
        self,
        placements: Sequence[Placement],
        transports: Sequence[str],
        sizes: Sequence[int],
        iterations: int,
        budget: timing.Budget,
        progress: Callable[[str], None],
    ) -> None:
        self.rows: list[Row] = []
        self.slowdowns: list[Slowdown] = []
        self.auto: list[Auto] = []
        self.skipped: dict[str, str] = {}
        self._placements = placements
        self._transports = transports
        self._sizes = sizes
        self._iterations = iterations
        self._budget = budget
        self._progress = progress
        self._patterns = Patterns()
        self._hosts: dict[tuple[str, str], Future[Served]] = {}

    def measure(self) -> None:
        """Placement by placement, lane by lane."""
        every = lanes.lanes(self._placements, self._transports or names())
        plans = {lane: self._plan(lane.placement) for lane in every}
        rows_left = sum(map(len, plans.values()))
        shelves = {placement: self._shelf(placement) for placement in self._placements}
        with ThreadPoolExecutor(thread_name_prefix="start-host") as starter, contextlib.ExitStack() as stack:
            stack.callback(self._close)
            for shelf in shelves.values():
                stack.enter_context(contextlib.closing(shelf))
            self._progress("starting hosts")
            self._start(starter, every, shelves)
            for placement in self._placements:
                self._progress(f"{placement.name}: what auto takes")
                self.auto.append(self._choose(placement))
                for lane in [lane for lane in every if lane.placement == placement]:
                    try:
                        sides = sum(len(_sides(other)) for other in every)
                        self._measure_lane(lane, plans[lane], shelves[placement], rows_left, sides)
                    except TransportError as error:
                        self.skipped[lane.title] = str(error)
                    except RuntimeError as error:  # the driver's or torch's: the other lanes may still be told
                        self.skipped[lane.title] = f"{type(error).__name__}: {error}"
                    rows_left -= len(plans[lane])
                    every.remove(lane)
                shelves[placement].close()
                self._patterns.forget(placement.trainer)

    def _start(self, starter: ThreadPoolExecutor, every: Sequence[Lane], shelves: Mapping[Placement, Shelf]) -> None:
        """Start every process the lanes need, side by side, and wait: that takes cores and memory bandwidth."""
        starting: list[Future[Any]] = []
        for lane in every:
            key = (lane.transport, lane.placement.daemon)
            if key not in self._hosts:
                sizes = [size for size, _ in self._plan(lane.placement)]
                self._hosts[key] = starter.submit(self._serve, *key, sizes)
            if lane.transport == "nccl" and lane.placement.name == "peer":
                starting.append(starter.submit(shelves[lane.placement].for_transport, "nccl", frozenset()))
        counts, largest = zip(*(shelf.ring for shelf in shelves.values()), strict=True)
        starting.append(starter.submit(self._patterns.prepare, max(counts), max(largest)))
        wait([*self._hosts.values(), *starting])

    def _shelf(self, placement: Placement) -> Shelf:
        count, largest = lanes.ring([size for size, _ in self._plan(placement)], placement.daemon)
        return Shelf(placement.daemon, placement.trainer, largest, count)

    def _plan(self, placement: Placement) -> list[tuple[int, str]]:
        """Sizes and the shapes they stand for."""
        if self._sizes:
            return [(size, "") for size in self._sizes]
        sweep = SIZES if _on_cpu(placement) else (*SIZES, LARGEST)
        return [*((size, "") for size in sweep), *((size, shape) for shape, size in SHAPES.items())]

    def _serve(self, name: str, device: str, sizes: Sequence[int]) -> Served:
        """Start a host for all lanes of a transport that have their daemon on `device`."""
        return Served(name, device, *lanes.ring(sizes, device, load_transport(name).traits), self._patterns)

    def _measure_lane(self, lane: Lane, plan: Sequence[tuple[int, str]], shelf: Shelf, rows: int, sides: int) -> None:
        """All rows and slowdowns of a lane. rows, sides: how many of each are still to come in all."""
        served = self._hosts[lane.transport, lane.placement.daemon].result()
        traits = served.transport.traits
        with lanes.wire(served, lane, secrets.token_bytes(8)) as wire:
            raw = None if lane.borrow else shelf.for_transport(lane.transport, traits.memory)
            for index, (size, shape) in enumerate(plan):
                what = f"{lane.title}, {shape or units.size(size)}"
                if size > served.slot_bytes:
                    self.skipped[what] = f"the ring's memory ends at slots of {units.size(served.slot_bytes)}"
                elif not self._budget.left:
                    self.skipped[what] = f"the time was up (--budget-s {self._budget.seconds:g})"
                else:
                    self._progress(what)
                    allowance = self._budget.share(rows - index, sides * load.SIDE_S)
                    self.rows.append(self._row(lane, served, wire, raw, shelf, size, shape, allowance))
            fits = min(served.slot_bytes, LOAD_BYTES)
            for side in _sides(lane):
                if not self._budget.left:
                    self.skipped[f"{lane.title}, slowdown"] = f"the time was up (--budget-s {self._budget.seconds:g})"
                    continue
                self._progress(f"{lane.title}, beside a matmul on the {side}'s GPU")
                busy = load.HostLoad(served.host) if side == "daemon" else load.Load(lane.placement.trainer)
                found = load.slowdown(busy, wire, fits)
                self.slowdowns.append(
                    Slowdown(placement=lane.placement.name, transport=lane.transport, side=side, **found)
                )

    def _row(
        self,
        lane: Lane,
        served: Served,
        wire: lanes.Wire,
        raw: timing.Mover | None,
        shelf: Shelf,
        size: int,
        shape: str,
        allowance_s: float,
    ) -> Row:
        """Time one size, then compare what came."""
        device, slots = lane.placement.trainer, served.num_slots if raw else 1
        lanes.clear(wire, size, device)
        cpu, daemon_cpu, moved = wire.cpu_s, served.daemon_cpu_s(), wire.moved
        found = timing.latency(wire, raw, size, allowance_s * LATENCY_SHARE, self._iterations)
        stream = timing.NO_STREAM
        if raw is not None:
            rest = allowance_s * (1 - LATENCY_SHARE)
            stream = timing.streamed(wire, raw, size, slots, rest, self._iterations and 2)
        gigabytes = (wire.moved - moved) / 1e9
        spent, daemon_spent = wire.cpu_s - cpu, served.daemon_cpu_s() - daemon_cpu
        hop = timing.NO_HOP
        if _staged(lane, served.transport.traits) and lane.transport == "shm":
            hop = self._hop(lane, shelf, size, allowance_s)
        return Row(
            placement=lane.placement.name,
            transport=lane.transport,
            mode="borrow" if lane.borrow else "copy",
            size_bytes=size,
            shape=shape,
            raw_kind=getattr(raw, "kind", ""),
            trainer_cpu_s_per_gb=round(spent / gigabytes, 4) if raw else None,
            daemon_cpu_s_per_gb=round(daemon_spent / gigabytes, 4) if raw else None,
            verified=lanes.verified(wire, served, self._patterns, size, device, slots),
            setup_ms=round(wire.setup_ms, 3),
            **found,
            **stream,
            **hop,
        )

    def _hop(self, lane: Lane, shelf: Shelf, size: int, allowance_s: float) -> dict[str, Any]:
        """The daemon's hop of a staged transport; it is made before READY, so no latency counts it."""
        try:
            staging, plain = shelf.staging(), shelf.to_host()
        except TransportError as error:
            self.skipped[f"{lane.title}, its hop to the host"] = str(error)
            return timing.NO_HOP
        return timing.hop(staging, plain, size, allowance_s * LATENCY_SHARE, self._iterations)

    def _choose(self, placement: Placement) -> Auto:
        """What `auto` takes between two processes, and why no other one."""
        order = HOST_ORDER if _on_cpu(placement) else DEVICE_ORDER

        def probe(name: str) -> str | None:
            try:
                return self._probe(name, placement)
            except RuntimeError as error:  # the driver's or torch's
                return f"{type(error).__name__}: {error}"

        try:
            choice = choose("auto", names(), False, placement.trainer, probe)
            reasons = dict(choice.reasons)
            for name in order:
                if name != choice.name and name not in reasons:
                    reasons[name] = f"not tried: it comes after {choice.name}"
            taken = choice.name
        except TransportError as error:
            taken, reasons = "", {"any": str(error)}
        return Auto(
            placement=placement.name, daemon=placement.daemon, trainer=placement.trainer, name=taken, reasons=reasons
        )

    def _probe(self, name: str, placement: Placement) -> str | None:
        """What a subscriber does before `auto` takes a transport: verified bytes, and speed where there is a floor."""
        key = (name, placement.daemon)
        if key not in self._hosts:
            self._hosts[key] = Future()
            try:
                self._hosts[key].set_result(self._serve(*key, [TIMED_BYTES]))
            except TransportError as error:
                self._hosts[key].set_exception(error)
        served = self._hosts[key].result()
        if name == "nixl" and placement.daemon != "cpu" and name not in candidates(placement.daemon):
            return f"a daemon serves it only where there is an RDMA device, and {RDMA_DEVICES} has none"
        floor, small = served.transport.traits.floor_gb_s, min(PROBE_BYTES, served.slot_bytes)
        large = min(TIMED_BYTES, served.slot_bytes)
        with lanes.wire(served, Lane(name, placement), secrets.token_bytes(8), 1, large) as wire:
            lanes.clear(wire, large, placement.trainer)
            wire.one(small)
            if not lanes.verified(wire, served, self._patterns, small, placement.trainer, 1):
                return "the bytes that arrived are not the ones that were sent"
            if not floor or large < LEAST_TIMED_BYTES:
                return None
            wire.one(large)  # the first one sets things up
            best = max(large / wire.one(large) / 1e9 for _ in range(TIMED_TRIES))
            if best >= floor:
                return None
            return f"it moves {units.size(large)} at {best:.2f} GB/s, and auto takes it from {floor:g} GB/s on"

    def _close(self) -> None:
        """End every host that was started."""
        for future in self._hosts.values():
            if not future.cancel() and future.exception() is None:
                with contextlib.suppress(TransportError):  # it may be gone
                    future.result().close()


def _sides(lane: Lane) -> tuple[Literal["daemon", "trainer"], ...]:
    """Whose GPU is to be loaded beside a lane; on one GPU, the daemon's."""
    if _on_cpu(lane.placement) or lane.transport not in load.LOADED or lane.borrow:
        return ()
    return ("daemon", "trainer") if lane.placement.trainer != lane.placement.daemon else ("daemon",)


def _on_cpu(placement: Placement) -> bool:
    return placement.daemon == "cpu"


def _staged(lane: Lane, traits: Traits) -> bool:
    """Whether a GPU target's states go through host memory."""
    return not _on_cpu(lane.placement) and "device" not in traits.memory

"""How fast is each transport on this machine, next to a raw copy of the same size, and which one would auto take?

A child process serves, this one fetches; `inproc` has both here. Each row alternates the transport's transfers with
raw copies of the same kind (`specd.bench.transport.raw`), first one at a time, then back to back.
"""

from __future__ import annotations

import contextlib
import functools
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Final, Literal

import msgspec

from specd import units
from specd.bench.machine import machine
from specd.bench.transport import auto, lanes, load, timing, wires
from specd.bench.transport.hosts import Hosts
from specd.bench.transport.lanes import MIB, DevicePair, Lane
from specd.bench.transport.raw import Shelf, two_sided
from specd.bench.transport.result import Auto, Slowdown, TransportResult, TransportRow
from specd.bench.transport.row import OpenLane, hop, measure, staged
from specd.bench.transport.served import Patterns
from specd.bench.transport.sizes import sizes as planned
from specd.errors import TransportError
from specd.transports.registry import known, names
from specd.transports.registry import load as load_transport

LOAD_BYTES: Final = 256 * MIB
"""The size that is streamed beside a matmul."""
BUDGET_S: Final = 150.0
"""Seconds a whole run may take unless told otherwise, the starts of the hosts included."""


def run(
    transports: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    iterations: int = 0,
    devices: str = "all",
    budget_s: float = BUDGET_S,
    progress: Callable[[str], None] = lambda what: None,
) -> TransportResult:
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
        every = lanes.lanes(found, transports or names())
        plans = {placement: planned(placement, sizes or ()) for placement in found}
        bench = _Bench(every, plans, iterations, budget, progress)
        bench.measure()
    finally:
        torch.set_num_threads(threads)
    return TransportResult(
        machine=machine(),
        budget_s=budget_s,
        wall_s=round(budget.spent, 1),
        auto=tuple(bench.auto),
        rows=tuple(bench.rows),
        slowdowns=tuple(bench.slowdowns),
        skipped=bench.skipped,
    )


def complain(result: TransportResult, transports: Sequence[str]) -> None:
    """Raise TransportError when one of these transports, which the user named, has no row in the result."""
    for name in transports:
        if not any(row.transport == name for row in result.rows):
            ours = f": {name}"
            reasons = [reason for title, reason in result.skipped.items() if title.split(",")[0].endswith(ours)]
            raise TransportError(f"{name} cannot be measured: {'; '.join(dict.fromkeys(reasons)) or 'no lane has it'}")


def sides(lane: Lane) -> tuple[Literal["daemon", "trainer"], ...]:
    """Whose GPU computes beside a lane's stream; on one GPU, the daemon's."""
    if lane.placement.daemon == "cpu" or lane.traits is None or not load.loads_a_gpu(lane.traits) or lane.borrow:
        return ()
    return ("daemon", "trainer") if lane.placement.trainer != lane.placement.daemon else ("daemon",)


class _Bench:
    """The rows and slowdowns of all lanes, within one budget; what could not be measured, with its reason."""

    def __init__(
        self,
        every: Sequence[Lane],
        plans: Mapping[DevicePair, Sequence[tuple[int, str]]],
        iterations: int,
        budget: timing.Budget,
        progress: Callable[[str], None],
    ) -> None:
        self.rows: list[TransportRow] = []
        self.slowdowns: list[Slowdown] = []
        self.auto: list[Auto] = []
        self.skipped: dict[str, str] = {}
        self._every = every
        self._plans = plans
        self._iterations = iterations
        self._budget = budget
        self._progress = progress
        self._patterns = Patterns()
        self._rows_left = sum(len(plans[lane.placement]) for lane in every)
        self._sides_left = sum(len(sides(lane)) for lane in every)

    def measure(self) -> None:
        """Placement by placement, lane by lane; the raw copies of a placement are freed before the next one."""
        shelves = {placement: self._shelf(placement) for placement in self._plans}
        with Hosts(self._patterns) as hosts, contextlib.ExitStack() as stack:
            for shelf in shelves.values():
                stack.enter_context(contextlib.closing(shelf))
            self._progress("starting hosts")
            hosts.start({_key(lane): self._bytes(lane.placement) for lane in self._every}, self._beforehand(shelves))
            for placement, shelf in shelves.items():
                self._progress(f"{placement.name}: what auto takes")
                self.auto.append(auto.pick(placement, known(names()), hosts, self._patterns))
                for lane in self._every:
                    if lane.placement == placement:
                        self._lane(lane, hosts, shelf)
                shelf.close()
                self._patterns.forget(placement.trainer)

    def _shelf(self, placement: DevicePair) -> Shelf:
        count, largest = lanes.ring(self._bytes(placement), placement.daemon)
        return Shelf(placement.daemon, placement.trainer, largest, count)

    def _beforehand(self, shelves: Mapping[DevicePair, Shelf]) -> list[Callable[[], object]]:
        """Slow preparations, run beside the hosts' starts: the patterns, and the processes of NCCL's raw copies."""
        counts, largest = zip(*(shelf.ring for shelf in shelves.values()), strict=True)
        actions: list[Callable[[], object]] = [functools.partial(self._patterns.prepare, max(counts), max(largest))]
        for lane in self._every:
            if lane.traits is not None and two_sided(lane.traits) and lane.placement.name == "peer":
                actions.append(functools.partial(shelves[lane.placement].for_transport, lane.traits))
        return actions

    def _bytes(self, placement: DevicePair) -> list[int]:
        return [size for size, _ in self._plans[placement]]

    def _lane(self, lane: Lane, hosts: Hosts, shelf: Shelf) -> None:
        """All rows and slowdowns of a lane. An error costs this lane only."""
        plan = self._plans[lane.placement]
        rows_after, sides_after = self._rows_left - len(plan), self._sides_left - len(sides(lane))
        try:
            served = hosts.get(_key(lane), self._bytes(lane.placement))
            with wires.wire(served, lane, secrets.token_bytes(8)) as wire:
                raw = None
                if not lane.borrow:
                    raw = shelf.for_transport(served.transport.traits)
                opened = OpenLane(lane, served, wire, raw)
                for size, shape in plan:
                    self._row(opened, shelf, size, shape)
                    self._rows_left -= 1
                for side in sides(lane):
                    self._beside(opened, side)
        except TransportError as error:
            self.skipped[lane.title] = str(error)
        except RuntimeError as error:  # the driver's or torch's: the other lanes may still work
            self.skipped[lane.title] = f"{type(error).__name__}: {error}"
        self._rows_left, self._sides_left = rows_after, sides_after

    def _row(self, opened: OpenLane, shelf: Shelf, size: int, shape: str) -> None:
        title = f"{opened.lane.title}, {shape or units.size(size)}"
        if size > opened.served.slot_bytes:
            self.skipped[title] = f"the ring's memory ends at slots of {units.size(opened.served.slot_bytes)}"
            return
        if self._out_of_time(title):
            return
        self._progress(title)
        allowance = self._budget.share(self._rows_left, self._sides_left * load.SIDE_S)
        row = measure(opened, self._patterns, size, shape, allowance, self._iterations)
        if staged(opened):
            try:
                row = msgspec.structs.replace(row, **hop(shelf, size, allowance, self._iterations))
            except TransportError as error:
                self.skipped[f"{opened.lane.title}, its hop to the host"] = str(error)
        self.rows.append(row)

    def _beside(self, opened: OpenLane, side: Literal["daemon", "trainer"]) -> None:
        """What a stream over the lane costs matmuls on one side's GPU."""
        lane, served, wire, _ = opened
        if self._out_of_time(f"{lane.title}, slowdown"):
            return
        self._progress(f"{lane.title}, beside a matmul on the {side}'s GPU")
        busy = load.HostLoad(served.host) if side == "daemon" else load.Load(lane.placement.trainer)
        found = load.slowdown(busy, wire, min(served.slot_bytes, LOAD_BYTES))
        self.slowdowns.append(Slowdown(placement=lane.placement.name, transport=lane.transport, side=side, **found))

    def _out_of_time(self, title: str) -> bool:
        if self._budget.left:
            return False
        self.skipped[title] = f"the time was up (--budget-s {self._budget.seconds:g})"
        return True


def _key(lane: Lane) -> tuple[str, str]:
    return lane.transport, lane.placement.daemon

"""Wires: trainers of a host, which move its slots and time them."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from specd.bench.transport.lanes import MIB, WINDOW, Lane
from specd.bench.transport.served import Patterns, Served
from specd.errors import TransportError
from specd.transports.base import Borrower, Client, Receiver, SlotRef
from specd.transports.checks import pattern

if TYPE_CHECKING:
    import torch

DEADLINE_S: Final = 60.0
REFILL_BYTES: Final = MIB


class Wire:
    """One trainer of a host: the transport's side of a row. cpu_s, moved: this process's seconds, bytes, so far."""

    def __init__(self, served: Served, client: Client, session: bytes, into: Sequence[torch.Tensor]) -> None:
        self._served = served
        self._client = client
        self._session = session
        self.into = into
        self.setup_ms = 0.0
        self.cpu_s = 0.0
        self.moved = 0

    def attach(self) -> None:
        """Open the session; `setup_ms` is what that costs, once."""
        begin = time.perf_counter()
        self._client.attach(self._served.host.accept(self._session, self._client.hello()), DEADLINE_S)
        self.setup_ms = (time.perf_counter() - begin) * 1e3

    def one(self, nbytes: int) -> float:
        ref, cpu = self._served.ref(0, nbytes), time.process_time()
        begin = time.perf_counter()
        self._announce(ref, 0)
        self._take(ref, 0)
        return self._done(begin, cpu, nbytes)

    def stream(self, nbytes: int, count: int) -> float:
        window, announced, cpu = len(self.into), 0, time.process_time()
        begin = time.perf_counter()
        for taken in range(count):
            while announced < min(count, taken + window):
                self._announce(self._served.ref(announced % window, nbytes), announced % window)
                announced += 1
            self._take(self._served.ref(taken % window, nbytes), taken % window)
        return self._done(begin, cpu, nbytes * count)

    def fetched(self, slot: int, nbytes: int) -> torch.Tensor:
        """What the last transfer of a slot brought."""
        return self.into[slot][:nbytes]

    def close(self) -> None:
        """End the session; the host goes on."""
        self._client.close()
        with contextlib.suppress(TransportError):  # the host may be gone
            self._served.host.drop(self._session)

    def _announce(self, ref: SlotRef, place: int) -> None:
        if self._served.transport.traits.needs_recv_ready:
            self._served.host.announce(self._session, ref)
        if isinstance(self._client, Receiver):
            self._client.expect(ref, self.into[place])

    def _take(self, ref: SlotRef, place: int) -> None:
        self._client.fetch(ref, self.into[place], DEADLINE_S)

    def _done(self, begin: float, cpu: float, nbytes: int) -> float:
        took = time.perf_counter() - begin
        self.cpu_s += time.process_time() - cpu
        self.moved += nbytes
        return took


class BorrowWire(Wire):
    """A trainer that reads slots where they lie."""

    def fetched(self, slot: int, nbytes: int) -> torch.Tensor:
        return cast(Borrower, self._client).view(self._served.ref(slot, nbytes))

    def _take(self, ref: SlotRef, place: int) -> None:
        cast(Borrower, self._client).view(ref)


@contextlib.contextmanager
def wire(served: Served, lane: Lane, session: bytes, slots: int = WINDOW, nbytes: int = 1 << 48) -> Iterator[Wire]:
    """A session of its own on a host, for one lane, and on its trainer's device.

    slots, nbytes: how many slots are to be used, and how much of them.
    """
    from specd.memory.streams import allocate

    device = lane.placement.trainer
    with on(device):
        room = 0 if lane.borrow else min(nbytes, served.slot_bytes)
        into = [allocate(room, device) for _ in range(min(slots, served.num_slots))]
        kind = BorrowWire if lane.borrow else Wire
        found = kind(served, served.transport.client(device), session, into)
        with contextlib.closing(found):
            found.attach()
            yield found


@contextlib.contextmanager
def on(device: str) -> Iterator[None]:
    """The calling thread's current device; nothing changes for the CPU."""
    import torch

    with torch.cuda.device(device) if device != "cpu" else contextlib.nullcontext():
        yield


def clear(found: Wire, nbytes: int, device: str) -> None:
    """Make the destinations hold nothing that could be taken for a slot of that size."""
    import torch

    for into in found.into:
        into[:nbytes].zero_()
    if device != "cpu":
        torch.cuda.synchronize(device)  # transfers wait for no stream but their own


def verified(found: Wire, served: Served, patterns: Patterns, nbytes: int, device: str, slots: int) -> bool:
    """Whether the last transfers of the first slots brought their bytes, and a refill then brings its own."""
    import torch

    good = True
    for slot in range(slots):
        expected = patterns.expected(slot, nbytes, device)
        good = good and torch.equal(found.fetched(slot, nbytes)[: expected.numel()], expected)
    fresh, part = secrets.token_bytes(16), min(nbytes, REFILL_BYTES)
    served.refill(fresh, part)
    try:
        found.one(part)
        content: Any = torch.from_numpy(pattern(fresh, part)).to(device)
        return good and torch.equal(found.fetched(0, part), content)
    finally:
        served.refill(None, part)

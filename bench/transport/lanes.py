"""What the transport benchmark moves bytes over: placements of daemon and trainer, hosts with known slots, wires."""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from specd.errors import ConfigError, TransportError
from specd.transports.base import Borrower, Client, Receiver, SlotRef, Traits, Transport
from specd.transports.checks import pattern
from specd.transports.registry import load
from specd.transports.testing.hosts import Host, LocalHost, SpawnedHost

if TYPE_CHECKING:
    import torch

MIB: Final = 1 << 20
WINDOW: Final = 4
"""Slots that are announced ahead in a stream, as a subscriber of depth 4 has them."""
RING_BYTES: Final = {"cpu": 512 * MIB, "cuda": 4096 * MIB}
"""A ring has fewer slots than WINDOW before it gets larger than this."""
DEADLINE_S: Final = 60.0
FILL_BYTES: Final = 64 * MIB
REFILL_BYTES: Final = MIB


class Placement(NamedTuple):
    """Where the daemon has its states, and where the trainer wants them."""

    name: str
    daemon: str
    trainer: str

    @property
    def title(self) -> str:
        if self.daemon == "cpu" and self.trainer == "cpu":
            return "host memory to host memory"
        where = "the same GPU" if self.daemon == self.trainer else "a peer GPU"
        return f"{self.daemon} to {self.trainer}, {where}"


class Lane(NamedTuple):
    """One transport on one placement. borrow: lent in place instead of copied."""

    transport: str
    placement: Placement
    borrow: bool = False

    @property
    def title(self) -> str:
        return f"{self.placement.name}: {self.transport}{' borrow' if self.borrow else ''}"


def placements(asked: str, num_gpus: int) -> list[Placement]:
    """What can be measured with so many GPUs, what matters most first.

    asked: `cpu`, `same`, `peer`, or `all` for everything that is here. Raises ConfigError when it is not.
    """
    known = {
        "peer": (2, Placement("peer", "cuda:0", "cuda:1")),
        "same": (1, Placement("same", "cuda:0", "cuda:0")),
        "cpu": (0, Placement("cpu", "cpu", "cpu")),
    }
    if asked != "all" and asked not in known:
        raise ConfigError(f"devices {asked!r}: expected all, {', '.join(known)}")
    found = [placement for name, (needed, placement) in known.items() if asked in (name, "all") and needed <= num_gpus]
    if not found:
        raise ConfigError(f"devices {asked!r} needs {known[asked][0]} CUDA devices, this process sees {num_gpus}")
    return found


def lanes(found: Sequence[Placement], transports: Sequence[str]) -> list[Lane]:
    """Every transport on every placement where it makes sense to ask.

    What goes through the host does not differ between the same GPU and a peer: of the two, the peer is measured.
    """
    peer = any(placement.name == "peer" for placement in found)
    every: list[Lane] = []
    for placement in found:
        for name in transports:
            try:
                traits = load(name).traits
            except TransportError:
                every.append(Lane(name, placement))  # it says why when it is measured
                continue
            on_gpu = placement.daemon != "cpu"
            if placement.name == "same" and peer and "device" not in traits.memory:
                continue
            if placement.name == "peer" and traits.scope == "process":
                continue
            every.append(Lane(name, placement))
            if on_gpu and traits.borrow and placement.daemon == placement.trainer:
                every.append(Lane(name, placement, borrow=True))
    return every


def ring(sizes: Sequence[int], device: str, traits: Traits | None = None) -> tuple[int, int]:
    """(slots, bytes of a slot) of a ring for these sizes; the largest ones do not fit a small GPU or /dev/shm.

    traits: of the transport that is to serve it, None for buffers of raw copies. Raises TransportError when no size
    fits.
    """
    soft, hard, where = RING_BYTES["cpu" if device == "cpu" else "cuda"], 1 << 48, ""
    if device != "cpu":  # a ring for each transport, and three times as much here
        free = free_on(device)
        soft, hard, where = min(soft, free // 16), free // 12, device
    if traits is not None and traits.scope == "host" and (device == "cpu" or "device" not in traits.memory):
        shared = free_shm() // 3  # as large a ring for the other placement, and one more slot for a hop's ceiling
        hard, where = min(hard, shared), "/dev/shm" if shared < hard else where
    fitting = [size for size in sizes if size <= hard]
    if not fitting:
        raise TransportError(f"{where} has {hard / MIB:.0f} MiB to spare for a slot, and every size needs more")
    largest = max(fitting)
    return max(1, min(WINDOW, min(soft, hard) // largest)), largest


def free_shm() -> int:
    """Free bytes of /dev/shm."""
    facts = os.statvfs("/dev/shm")
    return facts.f_bavail * facts.f_frsize


def free_on(device: str) -> int:
    """Free bytes of a GPU."""
    import torch

    return int(torch.cuda.mem_get_info(device)[0])


class Patterns:
    """What the slots of every ring of this run are filled with, and here to compare with.

    The first slot is filled whole, the others up to FILL_BYTES: making random bytes takes longer than moving them.
    """

    def __init__(self) -> None:
        self.nonces = [secrets.token_bytes(16) for _ in range(WINDOW)]
        self._kept: dict[tuple[int, str], torch.Tensor] = {}

    @staticmethod
    def filled(slot: int, slot_bytes: int) -> int:
        """How many bytes of a slot are."""
        return slot_bytes if slot == 0 else min(slot_bytes, FILL_BYTES)

    def prepare(self, num_slots: int, slot_bytes: int) -> None:
        """Make them, once for the largest ring."""
        for slot in range(num_slots):
            self.expected(slot, slot_bytes, "cpu")

    def expected(self, slot: int, nbytes: int, device: str) -> torch.Tensor:
        """What the first `nbytes` bytes of a slot begin with, on a device; the longest one is kept."""
        import torch

        nbytes = self.filled(slot, nbytes)
        kept = self._kept.get((slot, device))
        if kept is None or kept.numel() < nbytes:
            if device == "cpu":
                kept = torch.from_numpy(pattern(self.nonces[slot], nbytes))
            else:
                longest = max(nbytes, self._kept[slot, "cpu"].numel() if (slot, "cpu") in self._kept else 0)
                kept = self.expected(slot, longest, "cpu").to(device)
            self._kept[slot, device] = kept
        return kept[:nbytes]

    def forget(self, device: str) -> None:
        """Free what is kept on a GPU."""
        self._kept = {key: kept for key, kept in self._kept.items() if device == "cpu" or key[1] != device}


class Served:
    """A host whose ring holds the run's patterns."""

    def __init__(self, name: str, device: str, num_slots: int, slot_bytes: int, patterns: Patterns) -> None:
        self.transport: type[Transport] = load(name)
        if device == "cpu" and "host" not in self.transport.traits.memory:
            raise TransportError(f"{name} serves device memory only")
        self.num_slots = num_slots
        self.slot_bytes = slot_bytes
        self._patterns = patterns
        self._generations = [1] * num_slots
        self.host: Host
        if self.transport.traits.scope == "process":
            self.host = LocalHost(self.transport, num_slots, slot_bytes, device=device)
        else:
            self.host = SpawnedHost(name, num_slots, slot_bytes, device=device)
        try:
            for slot, nonce in enumerate(patterns.nonces[:num_slots]):
                self.host.fill(slot, 1, nonce, patterns.filled(slot, slot_bytes))
        except BaseException:
            self.host.close()
            raise

    def ref(self, slot: int, nbytes: int) -> SlotRef:
        """A lease on the first bytes of a slot."""
        return SlotRef(slot, self._generations[slot], nbytes)

    def refill(self, nonce: bytes | None, nbytes: int) -> None:
        """Give the first bytes of slot 0 other contents under a new generation, or back its own (None)."""
        self._generations[0] += 1
        self.host.fill(0, self._generations[0], nonce or self._patterns.nonces[0], nbytes)

    def daemon_cpu_s(self) -> float:
        """CPU seconds of the daemon's side so far; none when it is this process, whose are the trainer's."""
        return 0.0 if isinstance(self.host, LocalHost) else self.host.cpu_s()

    def close(self) -> None:
        self.host.close()


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

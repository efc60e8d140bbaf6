"""The nixl transport: the trainer READs slots out of the ring through NIXL, over RDMA or within one host.

One-sided: the worker only registers its memory and answers connections. A generation word is read before and after the
payload, each READ complete before the next one starts, so that a refill under the transfer is noticed.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import threading
import time
from typing import TYPE_CHECKING, ClassVar, Final

import msgspec
import numpy as np

from specd.errors import TransportError
from specd.memory import cuda
from specd.memory.arena import LINE, MAX_SLOTS, PAGE
from specd.transports.base import ServerContext, SlotRef, Traits
from specd.transports.checks import cancelled, check_into, check_ref, stale, unwrap, wrap
from specd.transports.nixl.agent import Destinations, NixlAgent, Region
from specd.transports.nixl.cutting import Cutter

if TYPE_CHECKING:
    import torch

    from specd.memory.arena import Arena

log = logging.getLogger(__name__)

RDMA_DEVICES: Final = "/sys/class/infiniband"
WORD: Final = 8
"""Bytes of a generation word."""
MAX_METADATA: Final = 1 << 16
POLL_S: Final = (1e-3, 20e-3)
"""Seconds between two polls for connecting trainers: within EAGER_S of an accept, and later."""
EAGER_S: Final = 5.0


class NixlHello(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """agent: the name of the trainer's agent."""

    agent: str


class NixlOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to read, and how.

    agent, metadata: the worker's agent, as NIXL describes it. slots: all slots, `stride` apart. words: from the
    generation word of the first slot to that of the last, `LINE` apart; in host memory also for slots on a device.
    """

    agent: str
    metadata: bytes
    slots: Region
    words: Region
    num_slots: int
    slot_bytes: int
    stride: int


class NixlServer:
    """Registers the arena, and answers trainers that connect on a thread of its own."""

    def __init__(self, arena: Arena) -> None:
        slots, lines, words = _layout(arena)
        self._agent = NixlAgent(arena.device)
        try:
            with self._agent.current():
                for region in (slots, lines):
                    self._agent.register(region)
                metadata = self._agent.metadata()
        except TransportError:
            self._agent.close()
            raise
        offer = NixlOffer(
            agent=self._agent.name,
            metadata=metadata,
            slots=slots,
            words=words,
            num_slots=arena.num_slots,
            slot_bytes=arena.slot_bytes,
            stride=arena.stride,
        )
        self._offer = wrap(offer)
        self._sessions: set[bytes] = set()
        self._eager_until = 0.0
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="specd-nixl", daemon=True)
        self._thread.start()

    def accept(self, session: bytes, hello: bytes) -> bytes:
        trainer = unwrap(hello, NixlHello, "nixl hello")
        with self._changed:
            if self._closed:
                raise TransportError("the nixl server is closed")
            if not self._thread.is_alive():
                raise TransportError("nixl: the daemon's engine failed and no trainer can connect; its log says why")
            self._sessions.add(session)
            self._eager_until = time.monotonic() + EAGER_S
            self._changed.notify()
        log.debug("nixl: agent %s may read agent %s", trainer.agent, self._agent.name)
        return self._offer

    def publish(self, session: bytes, ref: SlotRef) -> None:
        raise TransportError("nixl is pulled by the trainer: it never publishes")

    def drop(self, session: bytes) -> None:
        """Forget it: a late read is harmless, the trainer's generation check fails it."""
        with self._changed:
            self._sessions.discard(session)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()
        self._agent.close()

    def _run(self) -> None:
        with self._agent.current():
            while self._wait():
                try:
                    self._agent.progress()
                except TransportError:
                    log.exception("nixl: trainers can no longer connect")
                    return

    def _wait(self) -> bool:
        """Until it is time to look again; False ends the thread."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._sessions)
            if not self._closed:
                self._changed.wait(POLL_S[time.monotonic() >= self._eager_until])
            return not self._closed

    def __repr__(self) -> str:
        return f"NixlServer({self._agent!r}, {len(self._sessions)} sessions)"


class NixlClient:
    """Reads slot by slot; `device` is where the engine must be able to write."""

    def __init__(self, device: str) -> None:
        self._agent = NixlAgent(device)
        self._destinations = Destinations(self._agent)
        self._cutter = Cutter(self._agent, self._destinations, device)
        self._offer: NixlOffer | None = None
        self._page = mmap.mmap(-1, PAGE)
        self._word = np.frombuffer(self._page, np.uint64, 1)
        address = int(self._word.__array_interface__["data"][0])
        self._scratch = Region(memory="DRAM", address=address, nbytes=WORD)
        self._lock = threading.Lock()  # the agent's: one thread at a time
        self._stop = threading.Event()
        self._cancelled = False
        try:
            with self._agent.current():
                self._agent.register(Region(memory="DRAM", address=address, nbytes=PAGE))
        except TransportError:
            self._agent.close()
            raise

    def hello(self) -> bytes:
        return wrap(NixlHello(agent=self._agent.name))

    def attach(self, offer: bytes, deadline_s: float) -> None:
        found = checked(offer)
        with self._lock, self._agent.current():
            self._usable()
            self._offer = None
            self._agent.connect(found.agent, found.metadata)
            # The first READ makes the connection, and shows whether there is a way at all.
            self._generation(found, 0, deadline_s)
            self._offer = found

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        with self._lock, self._agent.current():
            self._usable()
            offer = self._offer
            if offer is None:
                raise TransportError("nixl: not attached, or closed")
            check_ref(ref, offer.num_slots, offer.slot_bytes, cuts=True)
            check_into(ref, into)
            local = self._destinations.region(into).part(0, ref.nbytes)
            if (found := self._generation(offer, ref.slot, deadline_s)) != ref.generation:
                raise stale(ref, found)
            slot = offer.slots.part(ref.slot * offer.stride, offer.slot_bytes)
            if (begin := ref.begin) is not None:
                self._agent.read(local, slot.part(begin, ref.nbytes), time.monotonic() + deadline_s, self._stop)
            else:
                self._cutter.bring(ref.pieces, slot, into, deadline_s, self._stop)
            if (found := self._generation(offer, ref.slot, deadline_s)) != ref.generation:
                raise stale(ref, found)

    def cancel(self) -> None:
        self._cancelled = True
        self._stop.set()

    def close(self) -> None:
        self._stop.set()  # ends a fetch that waits
        with self._lock:
            self._offer = None
            self._agent.close()
            self._destinations.forget()

    def _usable(self) -> None:
        if self._cancelled:
            raise cancelled("nixl")
        if self._stop.is_set():
            raise TransportError("nixl: not attached, or closed")
        if self._agent.closed:
            raise TransportError("nixl: an earlier transfer failed and took the connection with it", lost=True)

    def _generation(self, offer: NixlOffer, slot: int, deadline_s: float) -> int:
        """What the slot's generation word says now."""
        self._word[0] = 0
        word = offer.words.part(slot * LINE, WORD)
        self._agent.read(self._scratch, word, time.monotonic() + deadline_s, self._stop)
        return int(self._word[0])

    def __repr__(self) -> str:
        return f"NixlClient({self._agent!r}, {len(self._destinations)} destinations)"


class Nixl:
    """Registry entry of `nixl`."""

    traits: ClassVar[Traits] = Traits(
        memory=frozenset({"host", "device"}),
        scope="anywhere",
        one_sided=True,
        needs_recv_ready=False,
        abortable=False,
        cuts=True,
        floor_gb_s=1.0,
        rank=300,
    )

    @staticmethod
    def available(device: str) -> str | None:
        with contextlib.suppress(OSError):
            if os.listdir(RDMA_DEVICES):
                return None
        return f"no RDMA device under {RDMA_DEVICES}; without one it is served only where it is named"

    @staticmethod
    def server(arena: Arena, context: ServerContext) -> NixlServer:
        return NixlServer(arena)

    @staticmethod
    def client(device: str) -> NixlClient:
        return NixlClient(device)


def checked(data: bytes) -> NixlOffer:
    """The offer that came from a worker. Raises TransportError unless it is whole and describes a ring.

    Its addresses need not be true: NIXL refuses a READ outside of the regions that the metadata holds keys for.
    """
    offer = unwrap(data, NixlOffer, "nixl offer")
    slots, words = offer.slots, offer.words
    if not (
        1 <= offer.num_slots <= MAX_SLOTS
        and 1 <= offer.slot_bytes <= offer.stride < 1 << 48
        and slots.nbytes == offer.num_slots * offer.stride
        and words.nbytes == (offer.num_slots - 1) * LINE + WORD
        and words.memory == "DRAM"
        and words.address % WORD == 0
        and all(0 < part.address < (1 << 64) - part.nbytes and 0 <= part.device < 1024 for part in (slots, words))
        and 1 <= len(offer.metadata) <= MAX_METADATA
    ):
        raise TransportError(
            f"nixl offer of {offer.num_slots} slots of {offer.slot_bytes} bytes, {offer.stride} apart, at {slots} with "
            f"words at {words} and {len(offer.metadata)} bytes of metadata: that is no ring"
        )
    return offer


def _layout(arena: Arena) -> tuple[Region, Region, Region]:
    """(slots, lines, words) of an arena: all slots; the ledger up to the last line; from the first word to the last."""
    on_host = arena.memory == "host"
    slots = Region(
        memory="DRAM" if on_host else "VRAM",
        address=arena.address(0),
        nbytes=arena.num_slots * arena.stride,
        device=0 if on_host else cuda.ordinal(arena.device),
    )
    lines = Region(memory="DRAM", address=arena.ledger.mapping.address, nbytes=(arena.num_slots + 1) * LINE)
    return slots, lines, lines.part(arena.word_address(0) - lines.address, (arena.num_slots - 1) * LINE + WORD)

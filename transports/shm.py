"""The shm transport: the trainer maps the daemon's shared arena and copies its slots out of it.

A trainer on a GPU page-locks the mapping, so that its copies to the device run at the speed of the bus.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, ClassVar

import msgspec

from specd.endpoints import boot_id
from specd.errors import TransportError
from specd.memory import cuda
from specd.memory.arena import MAX_SLOTS, HostArena
from specd.transports.base import ServerContext, SlotRef, Traits
from specd.transports.checks import cancelled, pull, unwrap, wrap

if TYPE_CHECKING:
    import torch

    from specd.memory.arena import Arena

log = logging.getLogger(__name__)


class ShmHello(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """host: the trainer's boot id."""

    host: str


class ShmOffer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The arena to map; see `HostArena.open`, which trusts none of it."""

    path: str
    num_slots: int
    slot_bytes: int


class ShmServer:
    """Tells each session where the arena is; the rest is the trainer's own work."""

    def __init__(self, arena: Arena) -> None:
        self._offer = wrap(ShmOffer(path=arena.path, num_slots=arena.num_slots, slot_bytes=arena.slot_bytes))

    def accept(self, session: bytes, hello: bytes) -> bytes:
        trainer = unwrap(hello, ShmHello, "shm hello")
        if trainer.host != boot_id():
            raise TransportError("shm needs the trainer on the daemon's host: use --transport bytes")
        return self._offer

    def publish(self, session: bytes, ref: SlotRef) -> None:
        raise TransportError("shm is pulled by the trainer: it never publishes")

    def drop(self, session: bytes) -> None:
        """Nothing to forget: a late read is harmless, the trainer's generation check fails it."""

    def close(self) -> None:
        """Nothing to release: the segment is the arena's."""

    def __repr__(self) -> str:
        return "ShmServer()"


class ShmClient:
    """Maps the segment once, then copies slot by slot."""

    def __init__(self, device: str) -> None:
        self._device = cuda.resolve(device)
        self._copier = cuda.Copier()
        self._lock = threading.Lock()
        """Held while memory is used: attach, fetch and close may come from different threads."""
        self._arena: HostArena | None = None
        self._locked_pages = False
        self._cancelled = False

    def hello(self) -> bytes:
        return wrap(ShmHello(host=boot_id()))

    def attach(self, offer: bytes, deadline_s: float) -> None:
        if self._cancelled:
            raise cancelled("shm")
        found = unwrap(offer, ShmOffer, "shm offer")
        if not (1 <= found.num_slots <= MAX_SLOTS and found.slot_bytes >= 1):
            raise TransportError(
                f"shm offer of {found.num_slots} slots of {found.slot_bytes} bytes: expected 1 to {MAX_SLOTS} slots of "
                f"at least 1 byte"
            )
        on_device = self._device.startswith("cuda")
        # The driver page-locks nothing that is mapped read-only.
        arena = HostArena.open(found.path, found.num_slots, found.slot_bytes, writable=on_device)
        self.close()
        locked = on_device and self._lock_pages(arena)
        with self._lock:
            self._arena, self._locked_pages = arena, locked

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        with self._lock:
            if self._cancelled:
                raise cancelled("shm")
            if self._arena is None:
                raise TransportError("shm: not attached, or closed")
            pull(self._arena, ref, into, self._copier)

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        with self._lock:
            arena, self._arena = self._arena, None
            if arena is not None:
                if self._locked_pages:
                    cuda.unregister(arena.mapping.address, self._device)
                arena.close()

    def _lock_pages(self, arena: HostArena) -> bool:
        try:
            cuda.register(*arena.mapping, self._device)
        except TransportError as error:
            log.warning("shm copies to %s are several times slower: %s", self._device, error)
            return False
        return True

    def __repr__(self) -> str:
        return f"ShmClient({self._device}, {self._arena or 'not attached'})"


class Shm:
    """Registry entry of `shm`."""

    traits: ClassVar[Traits] = Traits(
        memory=frozenset({"host"}),
        scope="host",
        one_sided=True,
        needs_recv_ready=False,
        abortable=True,
        cuts=True,
        rank=500,
    )

    @staticmethod
    def available(device: str) -> None:
        return None

    @staticmethod
    def server(arena: Arena, context: ServerContext) -> ShmServer:
        if arena.memory != "host" or not arena.path or not arena.slot_bytes:
            raise TransportError(f"shm cannot serve {arena!r}: the ring must lie in shared host memory")
        return ShmServer(arena)

    @staticmethod
    def client(device: str) -> ShmClient:
        return ShmClient(device)

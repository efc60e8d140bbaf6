"""The shm transport: the trainer maps the daemon's shared arena read-only and copies its slots out of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import msgspec

from specd.arena import MAX_SLOTS, HostArena
from specd.errors import TransportError
from specd.transport import ServerContext, SlotRef, Traits, boot_id, pull, unwrap

if TYPE_CHECKING:
    import torch

    from specd.arena import Arena


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

    def __init__(self, arena: HostArena) -> None:
        self._offer = msgspec.msgpack.encode(
            ShmOffer(path=arena.path, num_slots=arena.num_slots, slot_bytes=arena.slot_bytes)
        )

    def accept(self, session: bytes, hello: bytes) -> bytes:
        trainer = unwrap(hello, ShmHello, "shm hello")
        if trainer.host != boot_id():
            raise TransportError("shm needs the trainer on the daemon's host: use --transport bytes")
        return self._offer

    def publish(self, session: bytes, ref: SlotRef) -> None:
        raise TransportError("shm is pulled by the trainer: it never publishes")

    def drop(self, session: bytes) -> None:
        """Nothing to forget: what a trainer still reads is harmless, its generation check tells it so."""

    def close(self) -> None:
        """Nothing to release: the segment is the arena's."""

    def __repr__(self) -> str:
        return "ShmServer()"


class ShmClient:
    """Maps the segment once, then copies slot by slot."""

    def __init__(self) -> None:
        self._arena: HostArena | None = None

    def hello(self) -> bytes:
        return msgspec.msgpack.encode(ShmHello(host=boot_id()))

    def attach(self, offer: bytes, deadline_s: float) -> None:
        found = unwrap(offer, ShmOffer, "shm offer")
        if not 1 <= found.num_slots <= MAX_SLOTS:
            raise TransportError(f"shm offer of {found.num_slots} slots: expected 1 to {MAX_SLOTS}")
        arena = HostArena.open(found.path, found.num_slots, found.slot_bytes)
        self.close()
        self._arena = arena

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        arena = self._arena
        if arena is None:
            raise TransportError("shm: not attached, or closed")
        pull(arena, ref, into)

    def close(self) -> None:
        arena, self._arena = self._arena, None
        if arena is not None:
            arena.close()

    def __repr__(self) -> str:
        return f"ShmClient({self._arena or 'not attached'})"


class Shm:
    """Registry entry of `shm`."""

    traits: ClassVar[Traits] = Traits(
        memory=frozenset({"host"}), scope="host", one_sided=True, needs_recv_ready=False, abortable=True
    )

    @staticmethod
    def server(arena: Arena, context: ServerContext) -> ShmServer:
        if not isinstance(arena, HostArena) or not arena.path:
            raise TransportError(f"shm cannot serve {arena!r}: the ring must lie in shared host memory")
        return ShmServer(arena)

    @staticmethod
    def client(device: str) -> ShmClient:
        return ShmClient()

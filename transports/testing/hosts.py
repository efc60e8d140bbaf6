"""A transport's serving side with an arena of its own: what tests, the doctor and benchmarks fetch from."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from typing import TYPE_CHECKING, Protocol

from specd.errors import TransportError
from specd.memory import cuda
from specd.memory.arena import HostArena
from specd.transports.base import ServerContext, SlotRef, Transport
from specd.transports.checks import pattern

if TYPE_CHECKING:
    from specd.memory.arena import Arena
    from specd.memory.device_arena import DeviceArena


class Host(Protocol):
    """A server, its arena, and what the worker would do with both."""

    def accept(self, session: bytes, hello: bytes) -> bytes: ...
    def publish(self, session: bytes, ref: SlotRef) -> None: ...
    def announce(self, session: bytes, ref: SlotRef) -> None:
        """`publish` without waiting for its outcome, as RECV_READY travels; a failure shows at the next call."""
        ...

    def drop(self, session: bytes) -> None: ...
    def begin(self, slot: int) -> None:
        """Start a refill of a slot: its former content is void."""
        ...

    def fill(self, slot: int, generation: int, nonce: bytes, nbytes: int) -> None:
        """Refill a slot with `pattern(nonce, nbytes)`."""
        ...

    def close(self) -> None:
        """End the server, then free the arena. Idempotent."""
        ...


class LocalHost:
    """A host in this process.

    device: where its arena lies. epoch, directory: the arena's name and a place for its sockets, made up when empty.
    tcp: an address of this machine to serve at as well, empty for none. curve: ask for keys there.
    """

    def __init__(
        self,
        transport: type[Transport],
        num_slots: int,
        slot_bytes: int,
        *,
        device: str = "cpu",
        epoch: str = "",
        directory: str = "",
        tcp: str = "",
        curve: bool = False,
    ) -> None:
        self.epoch = epoch or secrets.token_hex(16)
        self._resources = contextlib.ExitStack()
        if not directory:
            directory = self._resources.enter_context(tempfile.TemporaryDirectory(prefix="specd-host-"))
        try:
            shared = self.epoch if transport.traits.scope == "host" else None
            self._arena: HostArena | DeviceArena
            self._mirror: DeviceArena | None = None
            served: Arena
            if device == "cpu":
                served = self._arena = HostArena.create(num_slots, slot_bytes, shared)
            else:
                from specd.memory.device_arena import DeviceArena

                mirrored = "device" not in transport.traits.memory
                arena = DeviceArena.create(num_slots, slot_bytes, cuda.resolve(device), shared, mirrored)
                self._arena, self._mirror = arena, arena if mirrored else None
                served = arena.ledger if mirrored else arena
            self._resources.callback(self._arena.close)
            self._server = transport.server(served, ServerContext(directory=directory, host=tcp, curve=curve))
            self._resources.callback(self._server.close)
        except BaseException:
            self._resources.close()
            raise

    def accept(self, session: bytes, hello: bytes) -> bytes:
        offer = self._server.accept(session, hello)
        if self._mirror is not None:
            self._mirror.read_on_host(session, True)
        return offer

    def publish(self, session: bytes, ref: SlotRef) -> None:
        self._server.publish(session, ref)

    def announce(self, session: bytes, ref: SlotRef) -> None:
        self._server.publish(session, ref)

    def drop(self, session: bytes) -> None:
        self._server.drop(session)
        if self._mirror is not None:
            self._mirror.read_on_host(session, False)

    def begin(self, slot: int) -> None:
        self._arena.begin(slot)

    def fill(self, slot: int, generation: int, nonce: bytes, nbytes: int) -> None:
        self._arena.begin(slot)
        self._arena.write(slot, pattern(nonce, nbytes))
        self._arena.seal(slot, generation)

    def ask(self, what: str) -> float:
        """A question or an order of a subclass's own, by its name; a SpawnedHost passes it on."""
        raise TransportError(f"this host does not know {what!r}")

    def close(self) -> None:
        self._server.close()
        self._resources.close()

"""What a transport is: two sides, static traits, and when `auto` considers it.

A transport moves the bytes of a leased slot from the daemon's worker to a trainer. It has a server side in the
worker and a client side in the trainer; everything else (leases, credits, announcements) belongs to the control plane.

`auto` needs nothing but traits. The daemon serves every transport with a rank that suits the ring's memory and is
`available`; the trainer tries what it is offered by rank, lowest first, and takes the first that brings verified bytes,
as fast as its floor (`specd.transports.registry`).

A plug-in is a class like the built-in ones under an entry point of the group `specd.transports`. Two suites prove it:
`specd.transports.testing.suite`, or `receiver_suite` beside it if its client is a `Receiver`. See docs/plugins.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import msgspec

from specd.protocol.cut import Piece

if TYPE_CHECKING:
    import torch

    from specd.memory.arena import Arena


class Traits(msgspec.Struct, frozen=True, kw_only=True):
    """Static facts of a transport.

    memory: where the arena it exports may lie; one that takes both is given the device's.
    scope: how far apart the two sides may be.
    one_sided: the trainer pulls without the worker taking part.
    needs_recv_ready: the trainer announces RECV_READY and only then `Server.publish` is called.
    abortable: a transfer in flight can be given up and the next one made over the same client; if not, giving one up
    loses the client. borrow: its client is a `Borrower`. sealed: what it moves to another host is encrypted, and comes
    from the daemon, where `ServerContext.curve` asks for that; one that reaches further than a host and is not sealed
    is refused there, unless its users accept that (`insecure_data`). floor_gb_s: slower than this, `auto` does not take
    it.
    cuts: it takes the `pieces` of a SlotRef; one that does not serves no trainer that shares forwards.
    rank: where `auto` tries it, lowest first: inproc 100, cuda_ipc 200, nixl 300, nccl 400, shm 500, bytes 600, so that
    a plug-in may stand between any two. None: only for those who name it; `auto` tries it last, where a daemon does.
    """

    memory: frozenset[Literal["host", "device"]]
    scope: Literal["process", "host", "anywhere"]
    one_sided: bool
    needs_recv_ready: bool
    abortable: bool
    borrow: bool = False
    sealed: bool = False
    cuts: bool = False
    floor_gb_s: float = 0.0
    rank: int | None = None


class SlotRef(NamedTuple):
    """One leased slot: its index, the generation the lease is for, and the number of bytes that count.

    pieces: what of the slot goes where in these bytes; none where they are the slot's first.
    """

    slot: int
    generation: int
    nbytes: int
    pieces: tuple[Piece, ...] = ()

    @property
    def begin(self) -> int | None:
        """Where in the slot its bytes begin, if they follow one another there as they do at home; None if not."""
        if not self.pieces:
            return 0
        piece = self.pieces[0]
        whole = (piece.target, piece.rows, piece.width) == (0, 1, self.nbytes)
        return piece.source if whole and len(self.pieces) == 1 else None


class ServerContext(msgspec.Struct, frozen=True, kw_only=True):
    """Where a server that needs sockets may bind them.

    directory: this user's 0700 directory for ipc sockets; empty for none. host: the one interface (an address, no
    wildcard) to be reached at from other hosts; empty when the daemon is not to be reached from any. curve: the daemon
    asks for keys there: a server makes its own, for its life alone, and lets in whom it has accepted.
    """

    directory: str = ""
    host: str = ""
    curve: bool = False


class Server(Protocol):
    """The worker's side. Built by `Transport.server`, which raises TransportError when it cannot serve that arena.

    Called from the worker's service thread; no method may block on a peer. A server that must wait has its own thread.
    """

    def accept(self, session: bytes, hello: bytes) -> bytes:
        """Let one trainer in. `hello` is what its `Client.hello()` gave; returns the offer its `Client.attach` takes.

        Raises TransportError for a hello that is not one, or a trainer that cannot be served. A session that is
        accepted again starts afresh.
        """
        ...

    def publish(self, session: bytes, ref: SlotRef) -> None:
        """Start sending one slot to one session; returns at once. Only called for `needs_recv_ready` transports.

        The caller has checked that the session holds a lease on it. Transfers of one session are made in the order they
        were published in, and fetched in that order. Every publication is one transfer, also of a slot and generation
        that were published before: batches of equal content share a slot, and each is fetched. Where a transfer is
        abortable, the client skips those that belong to fetches that were given up; elsewhere it has to fetch each.
        Raises TransportError for a slot or session that does not exist; a slot that no longer holds the generation is
        the client's `fetch` to report.
        """
        ...

    def drop(self, session: bytes) -> None:
        """Forget a session and abandon what is in flight to it. Unknown sessions are ignored."""

    def close(self) -> None:
        """Release everything. Idempotent."""


class Client(Protocol):
    """The trainer's side. Built by `Transport.client(device)`, which raises TransportError when it cannot run here.

    A connecting thread opens and probes it (`hello`, `attach`, a few `fetch` or `view`); from then on the fetch thread
    alone calls it, except for `cancel`. `close` may come from either, or at the end from the trainer's.
    """

    def hello(self) -> bytes:
        """Opaque facts for `Server.accept`; at most 4 KiB."""
        ...

    def attach(self, offer: bytes, deadline_s: float) -> None:
        """Open what the worker offered. Raises TransportError when it cannot be opened here, within `deadline_s`."""

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        """Copy the slot's first `ref.nbytes` bytes to `into` (uint8 [≥ nbytes], on the client's device).

        Of a ref with pieces, these; what lies between them in `into` stays, or becomes 0.

        Nothing may still be reading or writing `into`: a transfer waits for no stream but its own.
        On return the bytes are usable on any stream and were verified to be of `ref.generation`.
        Raises TransportError when they are not, or when the transfer has made no progress for `deadline_s` seconds;
        `into` then holds garbage. If the error says `lost`, nothing can be fetched any more.

        Progress is whatever part of this very transfer arrived and was accepted, as finely as the transport can see it:
        a chunk over bytes, one READ over nixl, the whole transfer over nccl. Anything else that a peer sends is none,
        so a transfer is over in a bounded time. A copy that this process makes by itself (inproc, shm, cuda_ipc) waits
        for nobody and has no deadline.
        """

    def cancel(self) -> None:
        """Cancel every `attach` and `fetch`, under way or still to come: they fail, as `lost`. Returns at once.

        Called on any thread, at any time, also more than once and after `close`: when the session is over, because a
        transfer under way need not notice that its peer died, or its link. One that waits for a peer fails within a
        second; a copy that this process makes by itself may still end well. Only `close` may follow, and `view`.
        """

    def close(self) -> None:
        """Release everything. Idempotent."""


@runtime_checkable
class Receiver(Client, Protocol):
    """A client with several transfers in flight: they begin before they are fetched, and the wire does not idle."""

    def expect(self, ref: SlotRef, into: torch.Tensor) -> None:
        """Begin the transfer of `ref` to `into`; returns at once, and leaves errors to `fetch`.

        Called on the thread that fetches, for any number of slots, in the order of their RECV_READYs. Each is then
        fetched, in this order and to the same `into`, which belongs to the transfer until then; a slot that was not
        expected can be fetched once no expected one is left. A fetch that fails as `lost` loses all that are expected.
        """


class Borrower(Client, Protocol):
    """A client that can also lend a slot where it lies, without a copy."""

    def view(self, ref: SlotRef) -> torch.Tensor:
        """The slot's first `ref.nbytes` bytes in place, uint8, on the client's device, not to be written.

        Of a ref with pieces, those from its `begin` on. Valid until the lease is released, and verified to be of
        `ref.generation` now. Raises TransportError when they are not, have no `begin`, or lie on another device.
        """
        ...


class Transport(Protocol):
    """What a registry entry points to: a class with static traits and a factory for each side, never instantiated."""

    traits: ClassVar[Traits]

    @staticmethod
    def available(device: str) -> str | None:
        """Why `auto` does not serve a ring on `device` on this machine, or None; a quick look that opens nothing.

        A transport that is named is not asked: its `server` then says what is missing.
        """
        ...

    @staticmethod
    def server(arena: Arena, context: ServerContext) -> Server:
        """The worker's side for one arena. Raises TransportError when it cannot serve it."""
        ...

    @staticmethod
    def client(device: str) -> Client:
        """The trainer's side; `device` is where `fetch` delivers. Raises TransportError when it cannot run here."""
        ...

"""The bytes transport: slots as checksummed chunks over a ZeroMQ socket of their own; works between any two hosts.

A thread sends chunks straight from the slot, up to a window ahead of what the trainer acknowledges.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import zmq

from specd.curve import keys
from specd.curve.zap import Zap, user_of
from specd.endpoints import address, boot_id
from specd.errors import TransportError
from specd.protocol.cut import gather
from specd.transports.base import ServerContext, SlotRef, Traits
from specd.transports.bytes.client import BytesClient
from specd.transports.bytes.frames import CHUNK_BYTES, WINDOW, Header, Kind, checksum, unpack
from specd.transports.bytes.socket import BytesHello, BytesOffer, bind, new_token
from specd.transports.checks import check_ref, unwrap, wrap

if TYPE_CHECKING:
    from specd.memory.arena import Arena, HostArena

log = logging.getLogger(__name__)


class _Outgoing:
    """One slot in flight to one peer."""

    __slots__ = ("number", "offset", "ref")

    def __init__(self, number: int, ref: SlotRef) -> None:
        self.number = number
        self.ref = ref
        self.offset = 0


class _Peer:
    """One accepted session: its transfers in order, and how many messages it was sent and has taken.

    key: who alone may connect as it over tcp, if keys are asked for.
    """

    __slots__ = ("connected", "key", "sent", "session", "taken", "transfers")

    def __init__(self, session: bytes, key: str, num_slots: int) -> None:
        self.session = session
        self.key = key
        self.connected = False
        # An honest trainer fetches at most as many as there are slots; of one that gives up more, the oldest go.
        self.transfers: deque[_Outgoing] = deque(maxlen=2 * num_slots)
        self.sent = 0
        self.taken = 0

    @property
    def sendable(self) -> bool:
        return self.connected and bool(self.transfers) and self.sent - self.taken < WINDOW

    def cancel(self, number: int) -> None:
        """Send no more of a transfer."""
        for transfer in self.transfers:
            if transfer.number == number:
                self.transfers.remove(transfer)
                return


class BytesServer:
    """Owns the bulk socket on a thread of its own; every method queues a note for that thread."""

    def __init__(self, arena: HostArena, context: ServerContext) -> None:
        self._arena = arena
        self._zmq = zmq.Context()
        self._pair = keys.draw() if context.curve else None
        self._zap = Zap(self._zmq, self._lets_in)
        try:
            self._socket, self._ipc, self._tcp = bind(self._zmq, context, self._pair)
        except TransportError:
            self._zmq.destroy(linger=0)
            raise
        bound = address(self._tcp.removeprefix("tcp://").rpartition(":")[0])
        self._far = self._tcp if bound is not None and not bound.is_loopback else ""
        """The endpoint for trainers on other hosts; a loopback address would lead them to themselves."""
        self._notes: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._lock = threading.Lock()
        self._closed = False
        self.ignored = 0
        """Messages that were not of this protocol, or not from a peer that was let in."""
        self._peers: dict[bytes, _Peer] = {}
        self._tokens: dict[bytes, bytes] = {}
        self._transfers = 0
        self._thread = threading.Thread(target=self._run, name="specd-bytes", daemon=True)
        self._thread.start()

    def accept(self, session: bytes, hello: bytes) -> bytes:
        trainer = unwrap(hello, BytesHello, "bytes hello")
        known = (self._ipc, self._tcp) if trainer.host == boot_id() else (self._far,)
        endpoints = tuple(endpoint for endpoint in known if endpoint)
        if not endpoints:
            raise TransportError(
                "the trainer is on another host and the daemon listens nowhere it could reach: start the daemon with "
                "--endpoint tcp://ADDRESS:PORT, an address that the trainer's host can reach; a tunnel to that port is "
                "not enough, batches come over another one"
            )
        if self._pair is not None and not trainer.key:
            raise TransportError("the trainer uses no keys over bytes, and the daemon asks for them")
        token = new_token()
        self._tell(partial(self._on_accept, session, token, trainer.key))
        offer = BytesOffer(
            token=token,
            endpoints=endpoints,
            num_slots=self._arena.num_slots,
            slot_bytes=self._arena.slot_bytes,
            key=self._pair.public if self._pair else "",
        )
        return wrap(offer)

    def publish(self, session: bytes, ref: SlotRef) -> None:
        check_ref(ref, self._arena.num_slots, self._arena.slot_bytes, cuts=True)
        self._tell(partial(self._on_publish, session, ref))

    def drop(self, session: bytes) -> None:
        with contextlib.suppress(TransportError):  # closed: it is forgotten already
            self._tell(partial(self._on_drop, session))

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._zmq.term()
        os.close(self._wake)
        if self._ipc:  # libzmq leaves it
            Path(self._ipc.removeprefix("ipc://")).unlink(missing_ok=True)

    def _tell(self, note: Callable[[], None]) -> None:
        with self._lock:
            if self._closed or not self._thread.is_alive():
                raise TransportError("the bytes server is closed")
            self._notes.put(note)
            os.eventfd_write(self._wake, 1)

    # Everything below runs on the server's thread.

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake, zmq.POLLIN)
        poller.register(self._zap.socket, zmq.POLLIN)
        try:
            while not self._closed:
                idle = not any(peer.sendable for peer in self._peers.values())
                ready = dict(poller.poll(None if idle else 0))
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                self._heed_notes()
                if self._zap.socket in ready:
                    self._zap.handle()
                if self._socket in ready:
                    self._receive()
                for token, peer in self._peers.items():
                    if peer.sendable:
                        self._send_next(token, peer)
        except Exception:
            log.exception("the bytes server failed: its sessions will time out")
        finally:
            self._zap.close()
            self._socket.close(linger=0)

    def _heed_notes(self) -> None:
        while not self._notes.empty():
            self._notes.get()()

    def _lets_in(self, public: str) -> bool:
        """Whether a key is that of a session that was accepted; its note was left before its offer was sent."""
        self._heed_notes()
        return any(peer.key == public for peer in self._peers.values())

    def _on_accept(self, session: bytes, token: bytes, key: str) -> None:
        self._on_drop(session)
        self._tokens[session] = token
        self._peers[token] = _Peer(session, key, self._arena.num_slots)

    def _on_publish(self, session: bytes, ref: SlotRef) -> None:
        peer = self._peers.get(self._tokens.get(session, b""))
        if peer is not None:
            # Also of what is under way already: batches of equal content lie in one slot, and each is fetched.
            self._transfers += 1
            peer.transfers.append(_Outgoing(self._transfers, ref))

    def _on_drop(self, session: bytes) -> None:
        self._peers.pop(self._tokens.pop(session, b""), None)

    def _receive(self) -> None:
        for _ in range(64):  # then it is the senders' turn
            try:
                sender, *rest = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            token, frames = sender.bytes, [frame.bytes for frame in rest]
            # After each message: the note that lets its sender in was left before it was sent, and perhaps since the
            # last look. A HELLO that is taken for a stranger's is lost, and its trainer waits out its deadline.
            self._heed_notes()
            peer = self._peers.get(token)
            header = unpack(frames[0]) if len(frames) == 1 else None
            if peer is None or header is None or user_of(sender) not in ("", peer.key):
                self.ignored += 1
            elif header.kind is Kind.HELLO:
                peer.connected = True
                self._send(token, peer, [Header(Kind.WELCOME).pack()])
            elif header.kind is Kind.TAKEN and peer.taken <= header.total <= peer.sent:
                peer.taken = header.total
            elif header.kind is Kind.CANCEL:
                peer.cancel(header.transfer)
            else:
                self.ignored += 1

    def _send_next(self, token: bytes, peer: _Peer) -> None:
        """Send one chunk of the peer's first transfer."""
        transfer = peer.transfers[0]
        ref, offset = transfer.ref, transfer.offset
        length = min(CHUNK_BYTES, ref.nbytes - offset)
        before, slot = self._arena.generation(ref.slot), self._arena.slot(ref.slot)
        end = offset + length
        payload = gather(slot, ref.pieces, offset, end) if ref.pieces else slot[offset:end]
        # A refill after this second look shows in the checksum.
        digest, after = checksum(payload), self._arena.generation(ref.slot)
        gone = not before == after == ref.generation
        if gone:
            frames: list[bytes | memoryview] = [Header(Kind.GONE, slot=ref.slot, generation=ref.generation).pack()]
        else:
            header = Header(
                Kind.CHUNK, ref.slot, length, transfer.number, before, offset, total=ref.nbytes, checksum=digest
            )
            frames = [header.pack(), payload]
        if self._send(token, peer, frames):
            peer.sent += 1
            transfer.offset += length
            if gone or transfer.offset == ref.nbytes:
                peer.transfers.popleft()

    def _send(self, token: bytes, peer: _Peer, frames: list[bytes | memoryview] | list[bytes]) -> bool:
        try:
            self._socket.send_multipart([token, *frames], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            # Unreachable: its connection ended. Would block: it acknowledged more than it took. It has to attach anew.
            log.debug("bytes peer is lost: %s", error)
            peer.connected = False
            peer.transfers.clear()
            return False
        return True

    def __repr__(self) -> str:
        return f"BytesServer({self._ipc or self._tcp}, {len(self._peers)} sessions)"


class Bytes:
    """Registry entry of `bytes`."""

    traits: ClassVar[Traits] = Traits(
        memory=frozenset({"host"}),
        scope="anywhere",
        one_sided=False,
        needs_recv_ready=True,
        abortable=True,
        sealed=True,
        cuts=True,
        rank=600,
    )

    @staticmethod
    def available(device: str) -> None:
        return None

    @staticmethod
    def server(arena: Arena, context: ServerContext) -> BytesServer:
        if arena.memory != "host" or not arena.slot_bytes:
            raise TransportError(f"bytes cannot serve {arena!r}: the ring must lie in host memory")
        return BytesServer(arena.ledger, context)  # slots in host memory are in theirs

    @staticmethod
    def client(device: str) -> BytesClient:
        return BytesClient(device)

"""A daemon that answers handshakes, a transport and a training stream: they do as they are told by the test."""

from __future__ import annotations

import itertools
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, Self

import pytest
import torch
import zmq
from msgspec.structs import replace

from specd.client.conversation import Waiting
from specd.client.handshake import Session, Terms, open_session
from specd.client.interrupt import Interrupt
from specd.client.pending import State
from specd.client.subscriber import Subscriber
from specd.config.settings import SubscriberConfig
from specd.errors import TransportError
from specd.protocol import limits
from specd.protocol import messages as wire
from specd.protocol.batch import Batch, batch_id, slot_layout
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import ReplayInfo, RingInfo, TargetContract
from specd.protocol.messages import Message
from specd.transports.base import Client, Server, SlotRef, Traits
from specd.transports.checks import pattern, stale

SPEC = CaptureSpec(taps=(1,), dtype="float32")
CONTRACT = TargetContract(
    model="scripted", model_type="scripted", hidden_size=4, num_layers=8, vocab_size=128, dtype="float32", weights="w"
)
EXPECT_S = 20.0
MEMORY: dict[int, tuple[int, torch.Tensor]] = {}
"""The rings of the process: generation and bytes of each slot that was filled; no two daemons use one number."""
SLOTS = itertools.count(1 << 20)
"""Beyond the leases that tests make up: those of probes are answered by the daemon itself."""


def states(batch: Batch) -> torch.Tensor:
    """What the scripted target gives for a batch: float32 [T, 1, H]."""
    return torch.from_numpy(batch.tokens).float()[:, None, None].expand(-1, 1, CONTRACT.hidden_size).contiguous()


class Wire:
    """The client of `make`'s transport. cancelled, closed: whether it was."""

    def __init__(self, fetching: Callable[[SlotRef], None]) -> None:
        self._fetching = fetching
        self.cancelled = threading.Event()
        self.closed = False

    def hello(self) -> bytes:
        return b""

    def attach(self, offer: bytes, deadline_s: float) -> None:
        assert offer == b"offer"

    def fetch(self, ref: SlotRef, into: torch.Tensor, deadline_s: float) -> None:
        self._fetching(ref)
        into[: ref.nbytes] = self.view(ref)

    def view(self, ref: SlotRef) -> torch.Tensor:
        assert not self.closed
        generation, memory = MEMORY.get(ref.slot, (0, torch.empty(0)))
        if generation != ref.generation:
            raise stale(ref, generation)
        return memory[: ref.nbytes]

    def cancel(self) -> None:
        self.cancelled.set()

    def close(self) -> None:
        self.closed = True


class Scripted:
    """What `transport.load` gives for the transport of a test. made: its clients, in order."""

    traits: ClassVar[Traits]
    made: ClassVar[list[Wire]]
    fetching: ClassVar[Callable[[SlotRef], None]]

    @staticmethod
    def server(arena: object, context: object) -> Server:
        raise TransportError("a scripted transport has no server")

    @classmethod
    def client(cls, device: str) -> Client:
        cls.made.append(Wire(cls.fetching))
        return cls.made[-1]


def make(fetching: Callable[[SlotRef], None] = lambda ref: None, **traits: Any) -> type[Scripted]:
    """A transport out of `MEMORY`. fetching: called by each fetch before it copies."""
    facts: dict[str, Any] = {"one_sided": True, "needs_recv_ready": False, "abortable": True, **traits}
    found = Traits(memory=frozenset({"host"}), scope="process", **facts)
    return type("Made", (Scripted,), {"traits": found, "made": [], "fetching": staticmethod(fetching)})


class Work:
    """What the training stream has been told to do: a Point that is reached at `end`, or a failure then."""

    def __init__(self, error: Exception | None = None) -> None:
        self.awaited = threading.Event()
        self._done = threading.Event()
        self._error = error

    def synchronize(self) -> None:
        self.awaited.set()
        assert self._done.wait(EXPECT_S)
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        self._done.set()


class Daemon:
    """One endpoint. Every session gets `credits`; handshakes and RENEWs are answered, all else is for `expect`.

    replay: what it says that it keeps over epochs. refuses_to_lend: it answers BORROW with ERROR. deaf: it answers
    nothing any more, not even RENEW. loading_s: for how long it says that its worker may still load, 0 if one serves.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        transports: tuple[str, ...] = ("scripted",),
        slot_bytes: int = 4096,
        credits: int = 100,
        ttl_s: float = 30.0,
        replay: ReplayInfo | None = None,
    ) -> None:
        self.endpoint = f"inproc://scripted-{secrets.token_hex(4)}"
        self.epoch = secrets.token_bytes(limits.EPOCH_BYTES)
        self.refuses_to_lend = self.deaf = False
        self.loading_s = 0.0
        self.hellos: list[wire.Hello] = []
        self.heard: list[Message] = []
        """All that was not RENEW, in order; also of handshakes."""
        self._context = context
        self._transports = transports
        self._slot_bytes = slot_bytes
        self._credits = credits
        self._ttl_s = ttl_s
        self._replay = replay
        self._inbox: queue.SimpleQueue[tuple[bytes, Any]] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[bytes, Message]] = queue.SimpleQueue()
        self._probes: set[int] = set()
        self._keys: list[bytes] = []
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._closing = False
        bound = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(bound,))
        self._thread.start()
        assert bound.wait(EXPECT_S)

    def subscriber(self, **settings: Any) -> Subscriber:
        """A subscriber to it alone."""
        facts = {"transport": "scripted", "timeout_s": EXPECT_S, "connect_s": EXPECT_S, **settings}
        return Subscriber(SubscriberConfig(endpoints=(self.endpoint,), **facts), SPEC, context=self._context)

    def session(self, monkeypatch: pytest.MonkeyPatch, transport: type[Scripted] | None = None) -> Session:
        """A session with it, which no thread has."""
        made = transport or make()
        monkeypatch.setattr("specd.client.handshake.load", lambda name: made)
        terms = Terms(name="test", spec=lambda contract: SPEC, credits=2, transport="scripted", device="cpu")
        return open_session(self._context, self.endpoint, terms, Waiting(Interrupt(), lambda reason: None))

    def expect(self, kind: type[Any]) -> tuple[bytes, Any]:
        """The next message that is not answered here, which must be of that kind, and the key of its session."""
        key, message = self._inbox.get(timeout=EXPECT_S)
        assert isinstance(message, kind), message
        return key, message

    def quiet(self) -> bool:
        """Whether nothing is left for `expect`."""
        return self._inbox.empty()

    def say(self, key: bytes, message: Message) -> None:
        """Send to one session."""
        self._outbox.put((key, message))
        os.eventfd_write(self._wake, 1)

    def revoke(self) -> None:
        """End the session that was opened last."""
        self.say(self._keys[-1], wire.Revoke(epoch=self.epoch, reason="the worker died"))

    def ready(
        self, key: bytes, submit: wire.Submit, batch: Batch, *, stale: bool = False, source: wire.Source = "forward"
    ) -> SlotRef:
        """Fill a slot with a batch's states and announce it under a lease of the slot's number.

        stale: the slot is filled with something else by then.
        """
        layout = slot_layout(SPEC, CONTRACT.hidden_size, batch.num_tokens)
        assert submit.batch_id == batch_id(CONTRACT.fingerprint, batch.tokens, batch.lengths)
        ref = self._fill(states(batch).flatten().view(torch.uint8), layout.nbytes)
        if stale:
            MEMORY[ref.slot] = (ref.generation + 1, torch.empty(0))
        self.say(key, replace(self._ready(ref, submit.seq, submit.batch_id, layout), source=source))
        return ref

    def close(self) -> None:
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)
        MEMORY.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self, data: torch.Tensor, nbytes: int) -> SlotRef:
        slot = next(SLOTS)
        memory = torch.zeros(nbytes, dtype=torch.uint8)
        memory[: data.numel()] = data
        MEMORY[slot] = (slot, memory)
        return SlotRef(slot, slot, nbytes)

    def _ready(self, ref: SlotRef, seq: int, identity: bytes, layout: Any) -> wire.Ready:
        return wire.Ready(
            epoch=self.epoch, seq=seq, batch_id=identity, lease=ref.slot, slot=ref.slot, generation=ref.generation,
            layout=layout, busy_slots=1, target_us=1, held=SPEC if layout.tensors else None,
        )  # fmt: skip

    def _run(self, bound: threading.Event) -> None:
        with self._context.socket(zmq.ROUTER) as socket:
            socket.set(zmq.LINGER, 0)
            socket.bind(self.endpoint)
            bound.set()
            poller = zmq.Poller()
            poller.register(socket, zmq.POLLIN)
            poller.register(self._wake, zmq.POLLIN)
            while not self._closing:
                ready = dict(poller.poll())
                if self._wake in ready:
                    os.eventfd_read(self._wake)
                while not self._outbox.empty():
                    key, message = self._outbox.get()
                    socket.send_multipart([key, wire.encode(message)])
                if socket in ready:
                    key, frame = socket.recv_multipart()
                    for answer in self._hear(key, wire.decode_request(frame)):
                        socket.send_multipart([key, wire.encode(answer)])

    def _hear(self, key: bytes, message: Any) -> list[Message]:
        if self.deaf:
            return []
        if isinstance(message, wire.Renew):
            return [wire.Renewed(epoch=self.epoch)]
        self.heard.append(message)
        ring = RingInfo(num_slots=8, slot_bytes=self._slot_bytes, slot_tokens=64)
        match message:
            case wire.Status():
                return [
                    wire.StatusReport(
                        epoch=self.epoch, state="serving", version="0", pid=1, worker_pid=1, uptime_s=1.0,
                        loading_ms=round(self.loading_s * 1000),
                        contract=None if self.loading_s else CONTRACT, ring=ring, slots={}, queued=0, sessions=(),
                        counters={}, endpoints=(), transports=self._transports,
                    )
                ]  # fmt: skip
            case wire.Hello():
                self.hellos.append(message)
                self._keys.append(key)
                return [
                    wire.Welcome(
                        epoch=self.epoch, contract=CONTRACT, ring=ring, credits=min(self._credits, message.credits),
                        slots=8, lease_ttl_ms=round(self._ttl_s * 1000), transports=self._transports,
                        replay=self._replay,
                    )
                ]  # fmt: skip
            case wire.Attach():
                return [wire.Offer(epoch=self.epoch, transport=message.transport, offer=b"offer")]
            case wire.Probe():
                noise = torch.from_numpy(pattern(message.nonce, message.nbytes).copy())
                ref = self._fill(noise, message.nbytes)
                self._probes.add(ref.slot)
                return [self._ready(ref, message.seq, bytes(16), slot_layout(SPEC, 4, 1))]
            case wire.Borrow() if self.refuses_to_lend:
                return [wire.Error(epoch=self.epoch, reason="it cannot be watched")]
            case wire.RecvReady() | wire.Release() | wire.Borrow() if message.lease in self._probes:
                return []
        self._inbox.put((key, message))
        return []


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    limit = time.monotonic() + EXPECT_S
    while not condition():
        assert time.monotonic() < limit, "it never came to be"
        threading.Event().wait(0.005)


def num_fetched(source: Subscriber) -> int:
    """How many batches in flight are here, and not taken."""
    return sum(pending.state is State.FETCHED for pending in source._in_flight._window._batches)

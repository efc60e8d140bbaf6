"""One session with one daemon: connect, agree on the target, prove a transport with real bytes.

Straight-line code on the calling thread; afterwards the session's socket belongs to whoever keeps it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast, overload

import zmq

from specd import endpoints, units
from specd.client.ask import Context, dial
from specd.errors import ProtocolError, RejectedError, TransportError
from specd.memory import cuda
from specd.protocol import messages as wire
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import TargetContract
from specd.protocol.messages import Message
from specd.transports.base import Borrower, Client, SlotRef, Traits
from specd.transports.checks import pattern
from specd.transports.registry import Choice, as_transport_error, choose, known, load

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
N = TypeVar("N", bound=Message)
PROBE_BYTES = 256 << 10
TIMED_BYTES = 16 << 20
"""Most that is moved to time a transport."""
LEAST_TIMED_BYTES = 8 << 20
"""A smaller transfer is all latency, and says nothing about bandwidth."""
TIMED_TRIES = 3
"""The process may be busy with other things at one time; a transport is as fast as its fastest try."""
FIRST_S = 1.0
"""Longest wait for the first answer of a daemon that may not exist."""
STEP_S = 10.0
"""Longest wait for one answer of a daemon that has answered before."""


class Terms(NamedTuple):
    """What a trainer asks of a daemon.

    spec: of the capture, given the target. device: `cpu` or one with its index. borrow: read slots in place.
    fingerprint: empty for any target.
    """

    name: str
    spec: Callable[[TargetContract], CaptureSpec]
    credits: int
    transport: str
    device: str
    borrow: bool = False
    fingerprint: str = ""


class Session(NamedTuple):
    """An open session. client: the transport's side here, attached and proven; a Borrower's if `borrow`."""

    endpoint: str
    socket: zmq.Socket[bytes]
    welcome: wire.Welcome
    spec: CaptureSpec
    choice: Choice
    client: Client
    needs_recv_ready: bool
    borrow: bool

    @property
    def epoch(self) -> bytes:
        return self.welcome.epoch

    def hang_up(self) -> None:
        """End the session at the daemon, if it still listens, and close the socket; the client is the caller's."""
        _hang_up(self.socket, self.epoch)


class Later(Exception):
    """The daemon cannot take the session now; asking again may help."""


def open_session(context: Context, endpoint: str, terms: Terms, pause: Callable[[float], bool]) -> Session:
    """Open a session and prove its transport.

    pause: waits so many seconds before a Later that the daemon itself asked for. Raises Later when it may work another
    time; RejectedError when the daemon refuses for good; TransportError when the transport asked for cannot be used.
    """
    handshake = _Handshake(dial(context, endpoint), endpoint, terms, pause)
    try:
        return handshake.run()
    except BaseException:
        handshake.give_up()
        raise


def too_slow(transfer: Callable[[int], float], nbytes: int, floor_gb_s: float) -> str | None:
    """Why a transport is too slow for `auto`, or None. transfer: moves so many bytes, and returns the seconds."""
    transfer(nbytes)  # the first one sets things up
    best = 0.0
    for _ in range(TIMED_TRIES):
        best = max(best, nbytes / transfer(nbytes) / 1e9)
        if best >= floor_gb_s:
            return None
    return f"it moves {units.size(nbytes)} at {best:.2f} GB/s, and auto takes it from {floor_gb_s:g} GB/s on"


def _hang_up(socket: zmq.Socket[bytes], epoch: bytes) -> None:
    with contextlib.suppress(zmq.ZMQError):
        socket.send(wire.encode(wire.Bye(epoch=epoch)), zmq.NOBLOCK)
    socket.close(linger=100)


class _Handshake:
    """The questions and answers that open one session."""

    def __init__(self, socket: zmq.Socket[bytes], endpoint: str, terms: Terms, pause: Callable[[float], bool]) -> None:
        self._socket = socket
        self._endpoint = endpoint
        self._terms = terms
        self._pause = pause
        self._welcome: wire.Welcome | None = None
        self._client: Client | None = None
        self._traits: Traits | None = None

    def run(self) -> Session:
        status = self._ask(wire.Status(), wire.StatusReport, timeout_s=FIRST_S)
        if status.contract is None:
            self._pause(0.3)  # a worker takes seconds to load; there is nothing to wait on but the next answer
            raise Later(f"the daemon at {self._endpoint} is starting its worker")
        spec = self._terms.spec(status.contract)
        terms = self._terms
        hello = wire.Hello(
            name=terms.name,
            host=endpoints.host_id(),
            pid=os.getpid(),
            gpus=(cuda.uuid(terms.device),) if terms.device.startswith("cuda") else (),
            transports=(terms.transport,),
            spec=spec,
            credits=terms.credits,
            fingerprint=terms.fingerprint,
        )
        answer = self._ask(hello, wire.Welcome, wire.Reject)
        if isinstance(answer, wire.Reject):
            if answer.retry_ms:
                self._pause(answer.retry_ms / 1000)
                raise Later(answer.reason)
            raise RejectedError(f"{self._endpoint}: {answer.reason}")
        self._welcome = answer
        same_process = self._endpoint.startswith("inproc://")
        offered = answer.transports
        choice = choose(terms.transport, offered, known(offered), same_process, terms.device, self._probe)
        losers = "".join(f"; not {name}: {reason}" for name, reason in choice.reasons.items())
        log.info("%s: transport %s%s", self._endpoint, choice.name, losers)
        assert self._client is not None
        assert self._traits is not None
        needs_recv_ready = self._traits.needs_recv_ready
        return Session(self._endpoint, self._socket, answer, spec, choice, self._client, needs_recv_ready, terms.borrow)

    def give_up(self) -> None:
        """Leave nothing behind, here or at the daemon."""
        if self._client is not None:
            self._client.close()
        if self._welcome is None:
            self._socket.close(linger=0)
        else:
            _hang_up(self._socket, self._welcome.epoch)

    @overload
    def _ask(self, message: Message, kind: type[M], *, timeout_s: float = ...) -> M: ...
    @overload
    def _ask(self, message: Message, kind: type[M], other: type[N]) -> M | N: ...
    def _ask(
        self, message: Message, kind: type[Message], other: type[Message] | None = None, timeout_s: float = STEP_S
    ) -> Message:
        """Send one message and wait for one of the answers it may have."""
        self._say(message)
        reply = self._hear(timeout_s)
        if isinstance(reply, kind) or (other is not None and isinstance(reply, other)):
            return reply
        if isinstance(reply, wire.Revoke):
            raise Later(reply.reason)
        detail = f": {reply.reason}" if isinstance(reply, wire.Error) else ""
        raise ProtocolError(f"{self._endpoint} answered {type(message).__name__} with {type(reply).__name__}{detail}")

    def _say(self, message: Message) -> None:
        try:
            self._socket.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.Again:  # libzmq gave the connection up; waiting for it would be for ever
            raise Later(f"the connection to {self._endpoint} is gone") from None

    def _hear(self, timeout_s: float = STEP_S) -> Any:
        if not self._socket.poll(int(timeout_s * 1000)):
            raise Later(f"no answer from {self._endpoint} within {timeout_s:g} s")
        return wire.decode_reply(self._socket.recv())

    def _probe(self, name: str) -> str | None:
        """Move verified bytes over one transport; the reason why it is not to be used, or None."""
        assert self._welcome is not None
        if self._client is not None:
            self._client.close()
            self._client = None
        try:
            transport = load(name)
            self._traits = traits = transport.traits
            if self._terms.borrow and not traits.borrow:
                return "it cannot lend slots in place (subscriber.borrow)"
            with as_transport_error():
                self._client = client = transport.client(self._terms.device)
                hello = client.hello()
            attach = wire.Attach(epoch=self._welcome.epoch, transport=name, hello=hello)
            answer = self._ask(attach, wire.Offer, wire.Refuse)
            if isinstance(answer, wire.Refuse):
                return answer.reason
            with as_transport_error():
                client.attach(answer.offer, STEP_S)
            slot_bytes = self._welcome.ring.slot_bytes
            self._transfer(min(PROBE_BYTES, slot_bytes))
            timed = self._terms.transport == "auto" and not self._terms.borrow and slot_bytes >= LEAST_TIMED_BYTES
            large = min(TIMED_BYTES, slot_bytes)
            return too_slow(self._transfer, large, traits.floor_gb_s) if timed and traits.floor_gb_s else None
        except TransportError as error:
            # What failed because the session is over says nothing about the transport: then this raises Later.
            self._ask(wire.Renew(epoch=self._welcome.epoch), wire.Renewed)
            return str(error)

    def _transfer(self, nbytes: int) -> float:
        """Bring a slot of pseudo-random bytes here, the way batches will come; returns the seconds it took.

        Raises TransportError when it does not come, or not as it was sent.
        """
        import torch

        from specd.memory.streams import allocate

        assert self._welcome is not None
        assert self._client is not None
        assert self._traits is not None
        epoch, nonce = self._welcome.epoch, secrets.token_bytes(16)
        into = allocate(nbytes, self._terms.device)[:nbytes]
        ready = self._ask(wire.Probe(epoch=epoch, seq=0, nonce=nonce, nbytes=nbytes), wire.Ready, wire.Failed)
        if isinstance(ready, wire.Failed):
            raise Later(ready.reason)
        ref = SlotRef(ready.slot, ready.generation, nbytes)
        try:
            begin = time.monotonic()
            if self._terms.borrow:
                self._borrow(ready)
                into = cast(Borrower, self._client).view(ref)
            else:
                if self._traits.needs_recv_ready:
                    self._say(wire.RecvReady(epoch=epoch, lease=ready.lease))
                self._client.fetch(ref, into, STEP_S)
            took = time.monotonic() - begin
            if not torch.equal(into.cpu(), torch.from_numpy(pattern(nonce, nbytes))):
                raise TransportError("a probe arrived with other bytes than were sent")
            return took
        finally:
            self._say(wire.Release(epoch=epoch, lease=ready.lease))

    def _borrow(self, ready: wire.Ready) -> None:
        """Announce that a slot is read in place. Raises TransportError when the daemon does not allow it."""
        self._say(wire.Borrow(epoch=ready.epoch, lease=ready.lease))
        # BORROW is answered only when it is refused, and messages are acted on in order.
        answer = self._ask(wire.Renew(epoch=ready.epoch), wire.Renewed, wire.Error)
        if isinstance(answer, wire.Error):
            self._hear()
            raise TransportError(f"the daemon does not lend its slots: {answer.reason}")

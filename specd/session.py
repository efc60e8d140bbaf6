"""One session with one daemon: connect, agree on the target, prove a transport with real bytes.

Straight-line code on the calling thread; afterwards the session's socket belongs to whoever keeps it.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, overload

import zmq

from specd import config
from specd import protocol as wire
from specd.capture import CaptureSpec
from specd.errors import DaemonError, ProtocolError, RejectedError, TransportError
from specd.protocol import Message, TargetContract
from specd.transport import Choice, Client, SlotRef, choose, load, pattern

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
N = TypeVar("N", bound=Message)
Context = zmq.Context[zmq.Socket[bytes]]
PROBE_BYTES = 256 << 10
FIRST_S = 1.0
"""Longest wait for the first answer of a daemon that may not exist."""
STEP_S = 10.0
"""Longest wait for one answer of a daemon that has answered before."""


class Terms(NamedTuple):
    """What a trainer asks of a daemon. spec: of the capture, given the target. fingerprint: empty for any target."""

    name: str
    spec: Callable[[TargetContract], CaptureSpec]
    credits: int
    transport: str
    device: str
    fingerprint: str = ""


class Session(NamedTuple):
    """An open session. client: the transport's side here, attached and proven."""

    endpoint: str
    socket: zmq.Socket[bytes]
    welcome: wire.Welcome
    spec: CaptureSpec
    choice: Choice
    client: Client
    needs_recv_ready: bool

    @property
    def epoch(self) -> bytes:
        return self.welcome.epoch


class Later(Exception):
    """The daemon cannot take the session now; asking again may help."""


def dial(context: Context, endpoint: str) -> zmq.Socket[bytes]:
    """A socket to a daemon, under a fresh random routing id."""
    socket = context.socket(zmq.DEALER)
    socket.set(zmq.ROUTING_ID, b"\1" + secrets.token_bytes(15))
    socket.set(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
    socket.set(zmq.LINGER, 0)
    socket.set(zmq.RECONNECT_IVL, 50)
    socket.set(zmq.RECONNECT_IVL_MAX, 1000)
    socket.set(zmq.HEARTBEAT_IVL, 5000)
    socket.set(zmq.HEARTBEAT_TIMEOUT, 20000)
    socket.connect(config.resolve_endpoint(endpoint))
    return socket


def ask_status(endpoint: str, timeout_s: float) -> wire.StatusReport:
    """Ask a daemon what it is doing. Raises DaemonError when none answers."""
    with zmq.Context() as context, dial(context, endpoint) as socket:
        socket.send(wire.encode(wire.Status()))
        if not socket.poll(int(timeout_s * 1000)):
            raise DaemonError(
                f"no daemon answers at {config.resolve_endpoint(endpoint)} within {timeout_s:g} s: start one with "
                f"`specd start --model MODEL`, or name its --endpoint"
            )
        reply = wire.decode(socket.recv())
        if not isinstance(reply, wire.StatusReport):
            raise ProtocolError(f"the daemon answered with {type(reply).__name__}, expected StatusReport")
        return reply


def open_session(context: Context, endpoint: str, terms: Terms, pause: Callable[[float], bool]) -> Session:
    """Open a session and prove its transport.

    pause: waits so many seconds before a Later that the daemon itself asked for. Raises Later when it may work another
    time; RejectedError when the daemon refuses for good; TransportError when the transport asked for cannot be used.
    """
    socket = dial(context, endpoint)
    try:
        return _Handshake(socket, endpoint, terms, pause).run()
    except BaseException:
        socket.close(linger=0)
        raise


class _Handshake:
    """The questions and answers that open one session."""

    def __init__(self, socket: zmq.Socket[bytes], endpoint: str, terms: Terms, pause: Callable[[float], bool]) -> None:
        self._socket = socket
        self._endpoint = endpoint
        self._terms = terms
        self._pause = pause
        self._client: Client | None = None
        self._needs_recv_ready = False

    def run(self) -> Session:
        status = self._ask(wire.Status(), wire.StatusReport, timeout_s=FIRST_S)
        if status.contract is None:
            self._pause(0.3)  # a worker takes seconds to load; there is nothing to wait on but the next answer
            raise Later(f"the daemon at {self._endpoint} is starting its worker")
        spec = self._terms.spec(status.contract)
        hello = wire.Hello(
            name=self._terms.name,
            host=config.host_id(),
            pid=os.getpid(),
            transports=(self._terms.transport,),
            spec=spec,
            credits=self._terms.credits,
            fingerprint=self._terms.fingerprint,
        )
        answer = self._ask(hello, wire.Welcome, wire.Reject)
        if isinstance(answer, wire.Reject):
            if answer.retry_ms:
                self._pause(answer.retry_ms / 1000)
                raise Later(answer.reason)
            raise RejectedError(f"{self._endpoint}: {answer.reason}")
        self._welcome = answer
        same_process = self._endpoint.startswith("inproc://")
        choice = choose(self._terms.transport, answer.transports, same_process, self._probe)
        for loser, reason in choice.reasons.items():
            log.info("%s: transport %s is not used: %s", self._endpoint, loser, reason)
        log.info("%s: transport %s", self._endpoint, choice.name)
        assert self._client is not None
        return Session(self._endpoint, self._socket, answer, spec, choice, self._client, self._needs_recv_ready)

    @overload
    def _ask(self, message: Message, kind: type[M], *, timeout_s: float = ...) -> M: ...
    @overload
    def _ask(self, message: Message, kind: type[M], other: type[N]) -> M | N: ...
    def _ask(
        self, message: Message, kind: type[Message], other: type[Message] | None = None, timeout_s: float = STEP_S
    ) -> Message:
        """Send one message and wait for one of the answers it may have."""
        self._socket.send(wire.encode(message))
        if not self._socket.poll(int(timeout_s * 1000)):
            raise Later(f"no answer from {self._endpoint} within {timeout_s:g} s")
        reply: Any = wire.decode(self._socket.recv())
        if isinstance(reply, kind) or (other is not None and isinstance(reply, other)):
            return reply
        if isinstance(reply, wire.Revoke):
            raise Later(reply.reason)
        detail = f": {reply.reason}" if isinstance(reply, wire.Error) else ""
        raise ProtocolError(f"{self._endpoint} answered {type(message).__name__} with {type(reply).__name__}{detail}")

    def _probe(self, name: str) -> str | None:
        """Move verified bytes over one transport; the reason why that cannot be done, or None."""
        if self._client is not None:
            self._client.close()
            self._client = None
        try:
            transport = load(name)
            self._client = transport.client(self._terms.device)
            self._needs_recv_ready = transport.traits.needs_recv_ready
            attach = wire.Attach(epoch=self._welcome.epoch, transport=name, hello=self._client.hello())
            answer = self._ask(attach, wire.Offer, wire.Refuse)
            if isinstance(answer, wire.Refuse):
                return answer.reason
            self._client.attach(answer.offer, STEP_S)
            return self._transfer()
        except TransportError as error:
            return str(error)

    def _transfer(self) -> str | None:
        import torch

        assert self._client is not None
        epoch, nbytes = self._welcome.epoch, min(PROBE_BYTES, self._welcome.ring.slot_bytes)
        nonce = secrets.token_bytes(16)
        ready = self._ask(wire.Probe(epoch=epoch, seq=0, nonce=nonce, nbytes=nbytes), wire.Ready, wire.Failed)
        if isinstance(ready, wire.Failed):
            raise Later(ready.reason)
        try:
            if self._needs_recv_ready:
                self._socket.send(wire.encode(wire.RecvReady(epoch=epoch, lease=ready.lease)))
            into = torch.empty(nbytes, dtype=torch.uint8, device=self._terms.device)
            self._client.fetch(SlotRef(ready.slot, ready.generation, nbytes), into, STEP_S)
        finally:
            self._socket.send(wire.encode(wire.Release(epoch=epoch, lease=ready.lease)))
        expected = torch.from_numpy(pattern(nonce, nbytes))
        return None if torch.equal(into.cpu(), expected) else "a probe arrived with other bytes than were sent"

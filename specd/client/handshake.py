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
from typing import NamedTuple, cast

import zmq

from specd import endpoints, units
from specd.client.conversation import RETRY_S, STEP_S, Conversation, Later, Waiting
from specd.client.line import Context, Identity
from specd.errors import ConfigError, RejectedError, TransportError
from specd.memory import cuda
from specd.protocol import messages as wire
from specd.protocol.capture import CaptureSpec
from specd.protocol.contract import TargetContract
from specd.transports.base import Borrower, Client, SlotRef, Traits
from specd.transports.checks import pattern
from specd.transports.registry import Choice, as_transport_error, choose, known, load

log = logging.getLogger(__name__)

PROBE_BYTES = 256 << 10
TIMED_BYTES = 16 << 20
"""Most that is moved to time a transport."""
LEAST_TIMED_BYTES = 8 << 20
"""A smaller transfer is all latency, and says nothing about bandwidth."""
TIMED_TRIES = 3
"""The process may be busy with other things at one time; a transport is as fast as its fastest try."""
ATTACH_S = 20.0
"""Longest wait for a transport to be opened, which may be a connection with a handshake of its own."""


class Terms(NamedTuple):
    """What a trainer asks of a daemon.

    spec: of the capture, given the target. device: `cpu` or one with its index. borrow: read slots in place.
    fingerprint: empty for any target. payloads: names of what sequences bring beside their tokens. identity: who the
    trainer is over TCP, None without keys. insecure_data: whether states may come from another host in the clear
    although there are keys. run, ranks, share: as in a HELLO.
    """

    name: str
    spec: Callable[[TargetContract], CaptureSpec]
    credits: int
    transport: str
    device: str
    borrow: bool = False
    fingerprint: str = ""
    identity: Identity | None = None
    insecure_data: bool = False
    run: bytes = b""
    ranks: int = 1
    payloads: tuple[str, ...] = ()
    share: str = ""


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


def open_session(context: Context, endpoint: str, terms: Terms, waiting: Waiting) -> Session:
    """Open a session and prove its transport.

    Raises Later when it may work another time, or the subscriber closes; RejectedError when the daemon refuses for
    good; TransportError when the transport asked for cannot be used; ConfigError for float8 states that are borrowed.
    """
    handshake = _Handshake(Conversation(context, endpoint, waiting, terms.identity), endpoint, terms, waiting)
    try:
        with waiting.closing.calling(handshake.cancel):
            found = handshake.run()
    except BaseException:
        handshake.give_up()
        raise
    return handshake.session(*found)


def no_borrowing(dtype: str) -> str:
    """Why states of a float8 dtype cannot be read in a daemon's slot."""
    return (
        f"subscriber.borrow=true with states in {dtype}: they have to be decoded, and cannot be read in the daemon's "
        f"slot; leave one of them out"
    )


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

    def __init__(self, daemon: Conversation, endpoint: str, terms: Terms, waiting: Waiting) -> None:
        self._daemon = daemon
        self._endpoint = endpoint
        self._terms = terms
        self._waiting = waiting
        self._welcome: wire.Welcome | None = None
        self._client: Client | None = None
        self._traits: Traits | None = None
        self._sealed = terms.identity is not None and not terms.insecure_data and endpoints.is_far(endpoint)
        """Whether what comes from the daemon has to be encrypted."""

    def run(self) -> tuple[CaptureSpec, Choice]:
        """Agree on what is captured, and choose the transport."""
        self._daemon.reach()
        while (contract := (status := self._daemon.ask(wire.Status(), wire.StatusReport)).contract) is None:
            reason = f"the daemon at {self._endpoint} is starting its worker"
            self._waiting.tell(Later(reason, loading_s=status.loading_ms / 1000))
            self._waiting.closing.wait(RETRY_S)  # a worker takes seconds to load; only the next answer tells
        spec = self._terms.spec(contract)
        terms = self._terms
        if terms.borrow and spec.scaled:
            raise ConfigError(no_borrowing(spec.dtype))
        hello = wire.Hello(
            name=terms.name,
            host=endpoints.host_id(),
            pid=os.getpid(),
            gpus=(cuda.uuid(terms.device),) if terms.device.startswith("cuda") else (),
            transports=(terms.transport,),
            spec=spec,
            share=terms.share,
            credits=terms.credits,
            fingerprint=terms.fingerprint,
            run=terms.run,
            ranks=terms.ranks,
            payloads=terms.payloads,
        )
        answer = self._daemon.ask(hello, wire.Welcome, wire.Reject)
        if isinstance(answer, wire.Reject):
            if answer.retry_ms:
                raise Later(answer.reason, pause_s=answer.retry_ms / 1000, loading_s=answer.loading_ms / 1000)
            raise RejectedError(f"{self._endpoint}: {answer.reason}")
        self._welcome = answer
        same_process = self._endpoint.startswith("inproc://")
        offered = answer.transports
        choice = choose(terms.transport, offered, known(offered), same_process, terms.device, self._probe)
        losers = "".join(f"; not {name}: {reason}" for name, reason in choice.reasons.items())
        log.info("%s: transport %s%s", self._endpoint, choice.name, losers)
        return spec, choice

    def session(self, spec: CaptureSpec, choice: Choice) -> Session:
        """What was opened; its socket and client are the caller's."""
        assert self._welcome is not None
        assert self._client is not None
        assert self._traits is not None
        return Session(
            endpoint=self._endpoint,
            socket=self._daemon.release(),
            welcome=self._welcome,
            spec=spec,
            choice=choice,
            client=self._client,
            needs_recv_ready=self._traits.needs_recv_ready,
            borrow=self._terms.borrow,
        )

    def cancel(self) -> None:
        """End what it waits for; on any thread."""
        self._daemon.cancel()
        if (client := self._client) is not None:
            client.cancel()

    def give_up(self) -> None:
        """Leave nothing behind, here or at the daemon."""
        if self._client is not None:
            self._client.close()
        if self._welcome is None:
            self._daemon.release().close(linger=0)
        else:
            _hang_up(self._daemon.release(), self._welcome.epoch)

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
            if self._sealed and traits.scope == "anywhere" and not traits.sealed:
                return "it does not encrypt states, and keys are used (subscriber.insecure_data takes it nevertheless)"
            with as_transport_error():
                self._client = client = transport.client(self._terms.device)
                if self._waiting.closing.is_set():  # before there was one to cancel
                    client.cancel()
                hello = client.hello()
            attach = wire.Attach(epoch=self._welcome.epoch, transport=name, hello=hello)
            answer = self._daemon.ask(attach, wire.Offer, wire.Refuse)
            if isinstance(answer, wire.Refuse):
                return answer.reason
            with as_transport_error():
                client.attach(answer.offer, ATTACH_S)
            slot_bytes = self._welcome.ring.slot_bytes
            self._transfer(min(PROBE_BYTES, slot_bytes))
            timed = self._terms.transport == "auto" and not self._terms.borrow and slot_bytes >= LEAST_TIMED_BYTES
            large = min(TIMED_BYTES, slot_bytes)
            return too_slow(self._transfer, large, traits.floor_gb_s) if timed and traits.floor_gb_s else None
        except TransportError as error:
            # What failed because the session is over says nothing about the transport: then this raises Later.
            self._daemon.ask(wire.Renew(epoch=self._welcome.epoch), wire.Renewed)
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
        ready = self._daemon.ask(wire.Probe(epoch=epoch, seq=0, nonce=nonce, nbytes=nbytes), wire.Ready, wire.Failed)
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
                    self._daemon.say(wire.RecvReady(epoch=epoch, lease=ready.lease))
                self._client.fetch(ref, into, STEP_S)
            took = time.monotonic() - begin
            if not torch.equal(into.cpu(), torch.from_numpy(pattern(nonce, nbytes))):
                raise TransportError("a probe arrived with other bytes than were sent")
            return took
        finally:
            self._daemon.say(wire.Release(epoch=epoch, lease=ready.lease))

    def _borrow(self, ready: wire.Ready) -> None:
        """Announce that a slot is read in place. Raises TransportError when the daemon does not allow it."""
        self._daemon.say(wire.Borrow(epoch=ready.epoch, lease=ready.lease))
        # BORROW is answered only when it is refused, and messages are acted on in order.
        answer = self._daemon.ask(wire.Renew(epoch=ready.epoch), wire.Renewed, wire.Error)
        if isinstance(answer, wire.Error):
            self._daemon.hear()
            raise TransportError(f"the daemon does not lend its slots: {answer.reason}")

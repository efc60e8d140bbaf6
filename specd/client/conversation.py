"""A conversation: questions to one daemon and its answers, over a socket that is watched while it connects.

Straight-line code on the calling thread. What it waits for is told while it waits, and it waits for nothing any more
once the subscriber closes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, overload

import zmq

from specd.client.interrupt import Interrupt
from specd.client.line import Context, Identity, Line
from specd.errors import ProtocolError
from specd.protocol import messages as wire
from specd.protocol.messages import Message

M = TypeVar("M", bound=Message)
N = TypeVar("N", bound=Message)
T = TypeVar("T")
FIRST_S = 1.0
"""When it is first told that a daemon does not answer; after that in twice the time each."""
STEP_S = 10.0
"""Longest wait for a connection, and over it for one answer: many round trips of a second, or a daemon that is busy."""
RETRY_S = 0.3
"""Back-off before a daemon that is there and cannot be used yet is asked again."""


class Later(Exception):
    """The daemon cannot take the session now; asking again may help.

    pause_s: seconds to wait before that. loading_s: for how many seconds from now its worker may be loading the target,
    0.0 if it is not.
    """

    def __init__(self, reason: str, *, pause_s: float = 0.0, loading_s: float = 0.0) -> None:
        super().__init__(reason)
        self.pause_s = pause_s
        self.loading_s = loading_s


class Waiting(NamedTuple):
    """How a connecting thread waits. closing: ends it. tell: is told what it waits for, while it goes on waiting."""

    closing: Interrupt
    tell: Callable[[Later], None]


class Conversation:
    """One daemon's socket; every method but `cancel` raises Later when the daemon does not answer in time.

    The socket looks for a connection by itself all the time, so that a slow one need not begin anew; the next
    conversation has a new one. identity: who the trainer is over TCP, None without keys. Raises ConfigError for an
    endpoint that is none, or RejectedError while it waits, as `Line` does.
    """

    def __init__(self, context: Context, endpoint: str, waiting: Waiting, identity: Identity | None = None) -> None:
        self._endpoint = endpoint
        self._waiting = waiting
        self._line = Line(context, endpoint, identity)
        self._socket = self._line.socket
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = zmq.Poller()
        for each in (self._socket, self._line.monitor, self._wake):
            self._poller.register(each, zmq.POLLIN)
        self._since = 0.0
        """When the wait that is on began, or the connection got further."""
        self._refused = False

    def reach(self) -> None:
        """Wait until daemon and trainer have greeted each other."""
        if not self._endpoint.startswith("inproc://"):  # that has no connection to wait for
            self._until(self._connected)
            self._line.check_owner()  # it may be there only since it was dialled

    @overload
    def ask(self, message: Message, kind: type[M]) -> M: ...
    @overload
    def ask(self, message: Message, kind: type[M], other: type[N]) -> M | N: ...
    def ask(self, message: Message, kind: type[Message], other: type[Message] | None = None) -> Message:
        """Send one message and wait for one of the answers it may have. Raises ProtocolError for any other."""
        self.say(message)
        reply = self.hear()
        if isinstance(reply, kind) or (other is not None and isinstance(reply, other)):
            return reply
        if isinstance(reply, wire.Revoke):
            raise Later(reply.reason)
        detail = f": {reply.reason}" if isinstance(reply, wire.Error) else ""
        raise ProtocolError(f"{self._endpoint} answered {type(message).__name__} with {type(reply).__name__}{detail}")

    def say(self, message: Message) -> None:
        """Send one message."""
        try:
            self._socket.send(wire.encode(message), zmq.NOBLOCK)
        except zmq.Again:  # libzmq gave the connection up; waiting for it would be for ever
            raise self._gone() from None

    def hear(self) -> Any:
        """The daemon's next message."""
        return wire.decode_reply(self._until(self._received))

    def cancel(self) -> None:
        """End a wait, as the subscriber closes; on any thread, until the socket is released."""
        os.eventfd_write(self._wake, 1)

    def release(self) -> zmq.Socket[bytes]:
        """End the conversation; the socket is the caller's."""
        os.close(self._wake)
        return self._line.release()

    def _until(self, look: Callable[[], T | None]) -> T:
        """What `look` finds; waits for it, and tells that it does."""
        self._since, say_s = time.monotonic(), FIRST_S
        while True:
            if self._waiting.closing.is_set():
                raise Later("the subscriber is closed")
            if (found := look()) is not None:
                return found
            waited = time.monotonic() - self._since
            if waited >= STEP_S:
                raise Later(self._silence(STEP_S))
            if waited >= say_s:
                self._waiting.tell(Later(self._silence(say_s)))
                say_s *= 2
            self._poller.poll(round(max(0.0, min(say_s, STEP_S) - waited) * 1000) + 1)

    def _connected(self) -> bool | None:
        for event in self._line.events():
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                return True
            if event == zmq.EVENT_CONNECTED and not self._line.hung_up:
                self._refused, self._since = False, time.monotonic()
            refused = self._line.problem() or (event == zmq.EVENT_CONNECT_RETRIED and not self._line.hung_up)
            if refused and not self._refused:
                self._refused = True
                self._waiting.tell(Later(self._silence(0.0)))
        return None

    def _received(self) -> bytes | None:
        with contextlib.suppress(zmq.Again):
            return self._socket.recv(zmq.NOBLOCK)
        if zmq.EVENT_DISCONNECTED in self._line.events():
            raise self._gone()
        return None

    def _silence(self, waited_s: float) -> str:
        if problem := self._line.problem():
            return f"no session with {self._endpoint}: {problem}"
        if self._refused:
            return f"nobody listens at {self._endpoint}"
        return f"no answer from {self._endpoint} within {waited_s:g} s"

    def _gone(self) -> Later:
        return Later(f"the connection to {self._endpoint} is gone", pause_s=RETRY_S)

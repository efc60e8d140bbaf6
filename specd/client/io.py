"""The courier: the thread that owns the sockets of a subscriber's sessions, and all that is said over them."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from specd.client.handshake import Session
from specd.client.state import Guard, Link
from specd.errors import SpecdError
from specd.protocol import messages as wire
from specd.protocol.messages import Message


class Courier:
    """Carries messages between links and their owner, who is called on its thread with the lock held.

    lock: notified for each message that came. hear: told of each. gone: told of a link whose connection is, and why.
    tend: called once a turn, before what is due is sent. closed: given each session that was open to the end. guard:
    runs the thread's body.
    """

    def __init__(
        self,
        links: Sequence[Link],
        lock: threading.Condition,
        hear: Callable[[Link, Any], None],
        gone: Callable[[Link, str], None],
        tend: Callable[[], None],
        closed: Callable[[Session], None],
        guard: Guard,
    ) -> None:
        self._links = links
        self._lock = lock
        self._hear = hear
        self._gone = gone
        self._tend = tend
        self._closed = closed
        self._outbox: deque[tuple[Session, Message]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=guard, args=(self._run,), name="specd-io", daemon=True)
        self._thread.start()

    def post(self, session: Session, message: Message) -> None:
        """Have a message sent soon, if its session is still open then. With the lock held."""
        self._outbox.append((session, message))
        self.kick()

    def say(self, session: Session, message: Message) -> None:
        """Send a message now, if its session is open. On the courier's thread, with the lock held."""
        for link in self._links:
            if link.session is session:
                try:
                    session.socket.send(wire.encode(message), zmq.NOBLOCK)
                except zmq.Again:  # an embedded daemon that has ended
                    self._gone(link, "its connection is gone")

    def kick(self) -> None:
        """Have it look around."""
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Send what is due, end every session, then the thread."""
        self._closing.set()
        self.kick()
        self._thread.join()

    def close(self) -> None:
        """Stop; nobody may call it any more."""
        self.stop()
        os.close(self._wake)

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._turn()
        finally:
            with self._lock:
                with contextlib.suppress(SpecdError):
                    self._send()
                for link in self._links:
                    if link.session is not None:
                        self._closed(link.hang_up("the subscriber is closed"))

    def _turn(self) -> None:
        """Wait for something to do, and do it."""
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        with self._lock:
            up = [(link, link.session, link.monitor) for link in self._links if link.session]
            patience = min((link.renew_at for link, _, _ in up), default=time.monotonic() + 1.0)
        for _, session, monitor in up:
            poller.register(session.socket, zmq.POLLIN)
            poller.register(monitor, zmq.POLLIN)
        events = dict(poller.poll(max(0, int((patience - time.monotonic()) * 1000) + 1)))
        if self._wake in events:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
        for link, session, monitor in up:
            if session.socket in events:
                self._read(link, session)
            if monitor in events and link.session is session:
                assert monitor is not None
                recv_monitor_message(monitor)
                with self._lock:
                    self._gone(link, "its connection is gone")
        with self._lock:
            self._tend()
            self._send()

    def _read(self, link: Link, session: Session) -> None:
        """Hear all that a daemon has sent."""
        while link.session is session:
            try:
                message = wire.decode(session.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            with self._lock:
                link.heard = time.monotonic()
                self._hear(link, message)
                self._lock.notify_all()

    def _send(self) -> None:
        while self._outbox:
            self.say(*self._outbox.popleft())

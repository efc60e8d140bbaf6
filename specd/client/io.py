"""The I/O loop: the thread that owns the sockets of a subscriber's sessions, and finds out which are lost."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import zmq
from zmq.utils.monitor import recv_monitor_message

from specd.client.guard import Guard
from specd.client.handshake import Session
from specd.client.links import Link, Links
from specd.errors import SpecdError
from specd.protocol import messages as wire
from specd.protocol.messages import Message

RENEWALS_PER_TTL = 6
GONE = "its connection is gone"


class Lost(NamedTuple):
    """A session is over, to be hung up and opened anew."""

    reason: str


class Closed(NamedTuple):
    """The loop ends, and a session with it, to be hung up."""

    reason: str


Act = Callable[[Link, Message | Lost | Closed], None]


class SocketLoop:
    """Sends what is posted, renews leases, and hands on what comes.

    lock: held for all that is said of links. act: called with each message that came over a link or what became of its
    session, on the loop's thread, with the lock held; it hangs up sessions that are over. ended: whether it has hung up
    all that were up, and would not hear of another.
    """

    def __init__(self, links: Links, lock: threading.Condition, act: Act, guard: Guard) -> None:
        self._links = links
        self._lock = lock
        self._act = act
        self._outbox: deque[tuple[Session, Message]] = deque()
        self._epoch_batches = 0
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._closing = threading.Event()
        self.ended = False
        self._thread = guard.start("specd-io", self._run)

    def post(self, session: Session, message: Message) -> None:
        """Send a message soon, behind those posted before, if its session is still up then. With the lock held."""
        self._outbox.append((session, message))
        self.wake()

    def flush(self) -> list[Link]:
        """Send what was posted; returns links whose connection is gone. On the loop's thread, with the lock held."""
        gone: list[Link] = []
        while self._outbox:
            session, message = self._outbox.popleft()
            link = self._links.of(session)
            if link is None or link in gone:
                continue
            try:
                session.socket.send(wire.encode(message), zmq.NOBLOCK)
            except zmq.Again:  # an embedded daemon that has ended
                gone.append(link)
        return gone

    def abandon(self, session: Session, reason: str) -> None:
        """Have a session lost: its transport is. With the lock held."""
        if (link := self._links.of(session)) is not None:
            link.broken = reason
            self.wake()

    def tell_epoch(self, batches: int) -> None:
        """Tell all daemons, now and at each RENEW, how many batches there are in an epoch. With the lock held."""
        self._epoch_batches = batches
        for link in self._links:
            link.renew_at = 0.0
        self.wake()

    def wake(self) -> None:
        """Have it look at the links and its outbox."""
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """Send what is posted, end every session, then the thread."""
        self._closing.set()
        self.wake()
        self._thread.join()

    def close(self) -> None:
        """Stop; nothing may be posted any more."""
        self.stop()
        os.close(self._wake)

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._turn()
        finally:
            with self._lock:
                self.ended = True
                with contextlib.suppress(SpecdError):
                    self.flush()
                for link in self._links:
                    if link.session is not None:
                        self._act(link, Closed("the subscriber is closed"))

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
                    self._act(link, Lost(GONE))
        with self._lock:
            for link in self._links:
                self._keep(link)
            for link in self.flush():
                self._act(link, Lost(GONE))

    def _read(self, link: Link, session: Session) -> None:
        """Hand on all that a daemon has sent."""
        while link.session is session and not link.broken:
            try:
                message = wire.decode_reply(session.socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            with self._lock:
                link.heard = time.monotonic()
                self._act(link, message)

    def _keep(self, link: Link) -> None:
        """Keep a link's leases alive; a daemon that has not answered for half their life is lost."""
        session, now = link.session, time.monotonic()
        if session is None:
            return
        ttl_s = session.welcome.lease_ttl_ms / 1000
        if link.broken:
            self._act(link, Lost(link.broken))
        elif now - link.heard > ttl_s / 2:
            self._act(link, Lost(f"it has not answered for {now - link.heard:.1f} s"))
        elif now >= link.renew_at:
            link.renew_at = now + ttl_s / RENEWALS_PER_TTL
            self.post(session, wire.Renew(epoch=session.epoch, epoch_batches=self._epoch_batches))
